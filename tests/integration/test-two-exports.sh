#!/usr/bin/env bash
# Several images at once through one server, each an export of its own: they
# are kept apart, though all exports share one cache's memory.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/tar" 48M
mkdir "$work/exports"
names=(one.qcow2 two.qcow2 three.qcow2)
clusters=(64k 4k 2M)
types=(zlib zstd zstd)
for i in 0 1 2; do
    # Other data for each, so that bytes in the wrong file are noticed.
    dd if="$work/tar" of="$work/source$i" bs=8M skip="$i" count=3 status=none
    fresh_file "$work/exports/${names[i]}" 64M
done

start_nbdkit server --filter="$FILTER" --filter=log file dir="$work/exports" \
    qcowcache-size=8M logfile="$work/below.log"
clients=()
for i in 0 1 2; do
    convert "$work/source$i" "$(uri server "${names[i]}")" "${clusters[i]}" "${types[i]}" -W -m 16 &
    clients+=($!)
done
for client in "${clients[@]}"; do
    wait "$client"
done
stop_nbdkit server

for i in 0 1 2; do
    image_holds "$work/exports/${names[i]}" "$work/source$i"
done
[ "$(count_log "$work/below.log" odd)" -eq 0 ] || fail "storage received odd writes"
