#!/usr/bin/env bash
# print-stacks.sh PID: what every thread of a process is waiting for, for a test
# that has found it hanging.

if command -v gdb >/dev/null; then
    timeout -k 5 60 gdb -p "$1" -batch -nx -ex 'set pagination off' -ex 'thread apply all backtrace' 2>&1
fi
for task in "/proc/$1/task/"*; do
    printf '%s %s: %s\n' "${task##*/}" "$(cat "$task/comm")" "$(cat "$task/wchan")"
done
