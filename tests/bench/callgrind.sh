#!/usr/bin/env bash
# How many instructions the core needs for each write that it absorbs, where what
# is complete is written by the same thread, to storage that takes no time.

set -e -u -o pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $(basename "$0") CORE-BENCH [OTHER-CORE-BENCH]" >&2
    echo "Made by make -C tests core-bench; the other one is compared with the first." >&2
    exit 1
fi

# Printed: with COUNT writes of SIZE bytes: instructions CORE-BENCH SIZE COUNT
instructions ()
{
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$1" --only-absorb "$2" "$3" 2>&1 |
        awk '/Collected/ { found = $NF } END { if (!found) exit 1; print found }'
}

# Without what a process does once, and the first writes: per_write CORE-BENCH SIZE
per_write ()
{
    local few=1000 many=6000
    echo $((($(instructions "$1" "$2" "$many") - $(instructions "$1" "$2" "$few")) / (many - few)))
}

for size in 70 26700; do
    first=$(per_write "$1" "$size")
    line="$size bytes: $first instructions a write"
    if [ $# -eq 2 ]; then
        other=$(per_write "$2" "$size")
        line+=", the other one $other: $(awk -v a="$other" -v b="$first" 'BEGIN { printf "%+.2f", (a / b - 1) * 100 }') %"
    fi
    echo "$line"
done
