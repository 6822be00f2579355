#!/usr/bin/env bash
# A backup job that compresses with 64 workers, over storage that takes a random
# time for each request: entries overtake their data, and yet
# qcowcache-verify=error refuses nothing.
#
# LONG=1: 30 backups instead of 2.

source "$(dirname "$0")/functions.sh"

requires_program qemu-storage-daemon

make_uneven_plugin

# backup: $work/source to the image behind $work/server.sock
backup ()
{
    timeout 120 "$PYTHON" "$(dirname "$0")/backup_job.py" "$work/source" "$work/server.sock" \
        '{"x-perf": {"max-workers": 64}}'
}

make_tar_image "$work/source" 24M
count=2
[ "${LONG:-}" != 1 ] || count=30
for ((run = 0; run < count; run++)); do
    type=zlib
    [ $((run % 2)) -eq 0 ] || type=zstd
    # Little memory, so that clients meet the storage.
    start_nbdkit server --filter="$FILTER" "$uneven_plugin" kind=late qcowcache-verify=error \
        qcowcache-size=4M qcowcache-max-write=256K
    qemu-img create -q -f qcow2 -o "compression_type=$type" "$(uri server)" 24M
    backup
    image_holds "$(uri server)" "$work/source"
    stop_nbdkit server
    ! grep qcowcache "$work/server.err" || fail "run $run: an alarm for a backup that went well"
done
