#!/usr/bin/env bash
# Runs the engine's tests with a source and a target of each pair of versions, and writes docs/compatibility.md from what came out.
#   PAIRS="13:18 18:13"  only these (source:target); the document keeps what earlier runs found of the others
#   FILTER=streaming     only tests whose name contains that, and writes no document
#   PAIRS=none           only writes the document
# What the tests print is in target/matrix/<source>-<target>.txt.
set -euo pipefail
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
target=$(readlink -m "${CARGO_TARGET_DIR:-$root/target}")
results=$target/matrix
majors=(13 14 15 16 17 18)
# Each version on both sides; then the ends, and neighbours across the changes of 14 (binary values), 15, 16 (origins) and 17 (failover slots).
default="13:13 14:14 15:15 16:16 17:17 18:18 13:18 18:13 13:14 14:13 14:16 16:14 15:17 17:15 15:18 18:15 17:18 18:17"
pairs=${PAIRS:-$default}
mkdir -p "$results"

if [[ $pairs != none ]]; then
    "$root/scripts/servers.sh"
    cd "$root"
    cargo test -p mirror --test main --test failpoints --no-run
    for pair in $pairs; do
        source=${pair%:*} sink=${pair#*:}
        output=$results/$source-$sink.txt
        echo "matrix: source $source, target $sink"
        # What fails is what the document is about.
        PEERGATE_PG_BIN_SOURCE=$target/servers/$source/bin PEERGATE_PG_BIN_TARGET=$target/servers/$sink/bin RUST_BACKTRACE=0 \
            cargo test -p mirror --no-fail-fast --test main --test failpoints -- ${FILTER:+"$FILTER"} >"$output" 2>&1 || true
        grep '^test .*FAILED$' "$output" || true
        grep -q '^test result' "$output" || { tail -20 "$output"; exit 1; }
    done
    [[ -z "${FILTER:-}" ]] || exit 0
fi

sum() { awk -v what="$1" '/^test result:/ { for (i = 1; i < NF; i++) if ($(i + 1) ~ "^" what) n += $i } END { print n + 0 }' "$2"; }
document=$root/docs/compatibility.md
{
    echo "# Postgres versions"
    echo
    echo "Sources and targets may be PostgreSQL 13 to 18, each of any of these versions. Written by \`make matrix\`, which runs all of the engine's"
    echo "tests (\`mirror/tests\`: copy, stream, changes of schema, failures at every named point, networks that stall and break) on real servers of"
    echo "both versions. Rows are sources, columns targets; a cell is how many tests passed of how many. Pairs without a number were not run."
    echo
    echo "| source \\ target |$(printf ' %s |' "${majors[@]}")"
    echo "|$(printf ' --- |%.0s' source "${majors[@]}")"
    for source in "${majors[@]}"; do
        row="| **$source** |"
        for sink in "${majors[@]}"; do
            output=$results/$source-$sink.txt
            if [[ -e "$output" ]] && grep -q '^test result' "$output"; then
                passed=$(sum passed "$output") failed=$(sum failed "$output")
                row+=" $passed/$((passed + failed)) |"
            else
                row+="  |"
            fi
        done
        echo "$row"
    done
    echo
    failures=$(grep -l '^test .*FAILED$' "$results"/*-*.txt 2>/dev/null || true)
    if [[ -n "$failures" ]]; then
        echo "## What failed"
        echo
        for output in $failures; do
            pair=$(basename "$output" .txt)
            grep '^test .*FAILED$' "$output" | awk '{print $2}' | while read -r test; do
                reason=$(grep -F -A1 "thread '$test'" "$output" | sed -n 2p | cut -c1-300)
                echo "* ${pair%-*} to ${pair#*-}, \`$test\`: ${reason:-see its output}"
            done
        done
        echo
    fi
    cat "$root/scripts/compatibility-notes.md"
} >"$document"
echo "matrix: wrote $document"
