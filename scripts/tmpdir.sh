#!/usr/bin/env bash
# Prints the folder in which test servers keep their data: memory where the machine has room for it, because making, filling and deleting
# hundreds of servers on a disk takes longer than what is tested. What TMPDIR says goes first.
set -euo pipefail

memory=/dev/shm
# Both in MiB: what the file system may still take, and what the machine has for it.
room=$(df --output=avail -BM "$memory" 2>/dev/null | tail -1 | tr -dc '0-9' || true)
free=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) }' /proc/meminfo 2>/dev/null || true)
if [[ -n "${TMPDIR:-}" ]]; then
    echo "$TMPDIR"
elif [[ -k "$memory" && -w "$memory" && "${room:-0}" -ge 6144 && "${free:-0}" -ge 10240 ]]; then
    echo "$memory"
else
    echo /tmp
fi
