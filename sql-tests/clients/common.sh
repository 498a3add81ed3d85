# What the clients that are programs share. Sourced, in an empty folder of the test's own.
set -euo pipefail
export PSQLRC=/dev/null

# Fails unless two texts are the same.
expect() {
    [[ "$1" == "$2" ]] || { printf 'found:\n%s\nexpected:\n%s\n' "$1" "$2"; diff <(echo "$2") <(echo "$1"); exit 1; }
}

# What psql prints of a query through the gateway, and on the server itself.
ask() { psql -X -A -t -v ON_ERROR_STOP=1 -c "$1"; }
ask_directly() { PGPORT=$DIRECT_PORT ask "$1"; }

# Waits until a query prints something else than nothing, on the server itself.
wait_until() {
    local deadline=$((SECONDS + 60))
    until [[ -n "$(ask_directly "$1")" ]]; do
        ((SECONDS < deadline)) || { echo "waited in vain: $1"; exit 1; }
    done
}
