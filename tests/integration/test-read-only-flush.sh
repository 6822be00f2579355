#!/usr/bin/env bash
# A connection that can only read is told of flush and FUA what storage says, as
# without the filter; and so a flush succeeds after nbdkit's retry filter has
# opened the connection anew for reading only.

source "$(dirname "$0")/functions.sh"

fresh_image "$work/disk" 4M 16

# answers NAME NBDKIT-ARGUMENT...: what a client is told
answers ()
{
    local name=$1
    shift
    start_nbdkit "$name" "$@"
    nbdinfo --json "$(uri "$name")" |
        jq '.exports[0] | {is_read_only, can_flush, can_fua, can_trim, can_zero, can_multi_conn}' >"$work/$name.answers"
    stop_nbdkit "$name"
}

# same_answers NBDKIT-ARGUMENT...: with and without the filter
same_answers ()
{
    answers without "$@"
    answers with --filter="$FILTER" "$@"
    jq -e .is_read_only "$work/without.answers" >/dev/null || fail "not read-only: $*"
    diff -u "$work/without.answers" "$work/with.answers" || fail "not storage's own answers: $*"
}

same_answers -r file "$work/disk"
jq -e .can_flush "$work/with.answers" >/dev/null || fail "a file can be flushed, and nobody is told"
same_answers -r --filter=nozero file "$work/disk"
same_answers -r --filter=fua file "$work/disk" fuamode=emulate
same_answers -r memory 4M
# shellcheck disable=SC2016  # the plugin's own shell sets these variables
zeros='head -c "$3" /dev/zero'
# Storage that has no flush, and storage that decides by itself that it can only be read.
same_answers eval get_size='echo 4194304' pread="$zeros"
same_answers eval get_size='echo 4194304' pread="$zeros" can_flush='exit 0' flush='exit 0'

# The flush that retry tries: there is nothing to write, and storage takes it.
touch "$work/refuses"
start_nbdkit server -v --filter=retry --filter="$FILTER" --filter=log --filter=error file "$work/disk" \
    retries=1 retry-delay=1 retry-readonly=yes logfile="$work/below.log" \
    error-pread-rate=100% error-pread-file="$work/refuses"
is_waiting () { grep -q 'debug: retry 1: waiting' "$work/server.err"; }
run_client server <<'END' &
client.pread(4096, 1 << 20)
client.flush()
client.shutdown()
END
client=$!
wait_until 30 is_waiting || fail "retry does not try again"
rm "$work/refuses"
wait "$client" || fail "a flush fails though storage takes it: $(grep -v debug: "$work/server.err")"
[ "$(grep -c ' Flush ' "$work/below.log")" -gt 0 ] || fail "storage was not flushed"
stop_nbdkit server
