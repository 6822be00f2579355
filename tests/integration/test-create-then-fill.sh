#!/usr/bin/env bash
# An image is created through one connection and filled through another: the
# second one caches by the header that the first one wrote.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 30M
truncate -s 32M "$work/source"
target=$work/target.qcow2

# fill SERVER: what a client does
fill ()
{
    qemu-img create -q -f qcow2 -o cluster_size=64k "$(uri "$1")" 32M
    qemu-img convert -n -c -t none -f raw -O qcow2 "$work/source" "$(uri "$1")"
}

fresh_file "$target" 64M
start_nbdkit plain --filter=log file "$target" logfile="$work/plain.log"
fill plain
stop_nbdkit plain
mv "$target" "$work/without.qcow2"

fresh_file "$target" 64M
start_nbdkit server --filter="$FILTER" --filter=log file "$target" logfile="$work/below.log"
fill server
stop_nbdkit server

cmp "$target" "$work/without.qcow2" || fail "not the image that is written without the filter"
image_holds "$target" "$work/source"

bytes=$(count_log "$work/plain.log" bytes)
flushes=$(count_log "$work/plain.log" flushes)
writes=$(count_log "$work/below.log" writes)
[ "$(count_log "$work/below.log" odd)" -eq 0 ] || fail "storage received odd writes"
[ "$writes" -le $((bytes * 102 / 100 / 65536 + 4 * flushes)) ] ||
    fail "$writes writes reached storage for $bytes bytes and $flushes flushes"
