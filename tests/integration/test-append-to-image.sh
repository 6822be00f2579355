#!/usr/bin/env bash
# Compressed clusters appended to an image that exists already, with and
# without the filter: both end as the same bytes.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 16M
convert "$work/source" "$work/first.qcow2" 64k zlib
qemu-img resize -q -f qcow2 "$work/first.qcow2" 24M
truncate -s 64M "$work/first.qcow2"

# append SERVER: three runs, each by a client of its own that opens the image anew
append ()
{
    local run i commands
    for run in 0 1 2; do
        commands=()
        for i in {0..39}; do
            commands+=(-c "write -q -c -P $((run * 40 + i + 1)) $((16384 + (run * 40 + i) * 64))k 64k")
        done
        qemu-io "${commands[@]}" -f qcow2 "$(uri "$1")"
    done
}

cp "$work/first.qcow2" "$work/without.qcow2"
start_nbdkit plain file "$work/without.qcow2"
append plain
stop_nbdkit plain

cp "$work/first.qcow2" "$work/with.qcow2"
start_nbdkit server --filter="$FILTER" --filter=log file "$work/with.qcow2" logfile="$work/below.log"
append server
stop_nbdkit server

cmp "$work/with.qcow2" "$work/without.qcow2" || fail "not the image that is written without the filter"
cp "$work/source" "$work/expected"
for i in {0..119}; do
    head -c 65536 /dev/zero | tr '\0' "\\$(printf %o $((i + 1)))"
done >>"$work/expected"
truncate -s 24M "$work/expected"
image_holds "$work/with.qcow2" "$work/expected"
[ "$(count_log "$work/below.log" odd)" -eq 0 ] || fail "storage received odd writes"
