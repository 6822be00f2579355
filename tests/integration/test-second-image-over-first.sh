#!/usr/bin/env bash
# New images over old ones, each with another cluster size: through one server,
# on one file, that is never emptied in between.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 30M
target=$work/target.qcow2

fresh_file "$target" 96M
start_nbdkit server --filter="$FILTER" --filter=log file "$target" logfile="$work/below.log"
for cluster in 64k 2M 4k 64k 2M; do
    convert "$work/source" "$(uri server)" "$cluster" zstd
    # Through the server: what the last connection left is there for the next.
    qemu-img compare -q -f raw -F qcow2 "$work/source" "$(uri server)" ||
        fail "$cluster: a second connection reads another image"
done
stop_nbdkit server

image_holds "$target" "$work/source"
[ "$(count_log "$work/below.log" odd)" -eq 0 ] || fail "storage received odd writes"
[ "$(qemu-img info --output=json -f qcow2 "$target" | jq '.["cluster-size"]')" -eq $((2 << 20)) ] ||
    fail "the last image is not the one that is stored"
