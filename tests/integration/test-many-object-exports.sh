#!/usr/bin/env bash
# 64 exports at once over storage that prefers blocks of 4M, with 64M of memory:
# the images are right, memory stays within its bound, every export gets as much
# of it as its writes need to become fewer, and the operator is told once why
# they are smaller than they could be.

source "$(dirname "$0")/functions.sh"

exports=64
make_half_random "$work/source" 100 40000
mkdir "$work/disks"
for ((i = 0; i < exports; i++)); do fresh_file "$work/disks/$i" 16M; done

start_nbdkit server --filter="$FILTER" --filter=delay --filter=blocksize-policy \
    file dir="$work/disks" delay-write=20ms delay-read=20ms \
    blocksize-minimum=1 blocksize-preferred=4M blocksize-maximum=4M \
    qcowcache-size=64M qcowcache-stats="$work/report.json"
clients=()
for ((i = 0; i < exports; i++)); do
    convert "$work/source" "$(uri server "$i")" 64k zlib -W -m 4 &
    clients+=($!)
done
for client in "${clients[@]}"; do
    wait "$client" || fail "a conversion has failed"
done
stop_nbdkit server

for ((i = 0; i < exports; i++)); do
    image_holds "$work/disks/$i" "$work/source"
done
jq -r '.exports[] | "\(.name): \(.storage_writes) writes of \(.client_writes), \(.writes_through) of them through"' \
    "$work/report.json" | sort -k 2 -n | sed -n '1p;$p'
jq -e '.memory_peak_bytes <= 67108864' "$work/report.json" >/dev/null ||
    fail "more memory than allowed: $(jq .memory_peak_bytes "$work/report.json")"
[ "$(jq '.exports | length' "$work/report.json")" -eq "$exports" ] || fail "not $exports exports"
jq -e '.exports | all(.storage_writes * 3 <= .client_writes)' "$work/report.json" >/dev/null ||
    fail "an export has got no memory"
[ "$(grep -c 'qcowcache-size, now 67108864, is too small' "$work/server.err")" -eq 1 ] ||
    fail "not one message about memory: $(cat "$work/server.err")"
[ "$(wc -l <"$work/server.err")" -eq 1 ] || fail "nbdkit says: $(cat "$work/server.err")"
