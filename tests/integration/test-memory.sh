#!/usr/bin/env bash
# Peak resident memory of nbdkit is that of the same work without the filter,
# qcowcache-size, and not much more; that holds for checks, too.

source "$(dirname "$0")/functions.sh"

if [ "${LONG:-}" = 1 ]; then : "${SIZE:=512M}"; fi
: "${SIZE:=128M}"
allowance_kib=8192
make_tar_image "$work/source" "$SIZE"
missed=0

# compare WHAT MEBIBYTES FOUND WITHOUT
compare ()
{
    echo "$1, qcowcache-size=$2M: peak $3 KiB, $4 KiB without the filter, $(($3 - $4)) KiB more"
    if [ $(($3 - $4)) -gt $(($2 * 1024 + allowance_kib)) ]; then
        echo "    MISSED: limit $(($2 * 1024 + allowance_kib)) KiB"
        missed=$((missed + 1))
    fi
}

# conversion SERVER NBDKIT-ARGUMENT...: its peak memory in $peak
conversion ()
{
    fresh_file "$work/target" $((2 * $(stat -c %s "$work/source")))
    start_nbdkit "$@"
    convert "$work/source" "$(uri "$1")" 64k zstd -W -m 16
    peak=$(peak_memory "$1")
    stop_nbdkit "$1"
}

# scattered SERVER NBDKIT-ARGUMENT...: two clients with most bytes of each of 2048
# units, which nothing ever completes, and whole units between them.  (Not very
# large ones: nbdkit keeps a buffer of the largest request for each thread.)
scattered ()
{
    fresh_image "$work/target" 160M 16
    start_nbdkit "$@"
    python "$work/$1.sock" <<'END'
import sys
from nbd_clients import connect
clients = [connect(sys.argv[1]) for _ in range(2)]
for i in range(1, 2048):
    clients[i % 2].pwrite(b"some bytes" * 4000, i * 65536 + i * 7 % 20000)
    if i % 64 == 0:
        clients[0].pwrite(b"x" * 131072, (130 << 20) + i * 2048)
for i in range(1, 2048):
    assert clients[1].pread(40000, i * 65536 + i * 7 % 20000) == b"some bytes" * 4000
END
    peak=$(peak_memory "$1")
    stop_nbdkit "$1"
}

# pieces SERVER NBDKIT-ARGUMENT...: single bytes that no two touch, where
# bookkeeping could outgrow the bytes
pieces ()
{
    fresh_image "$work/target" 64M 16
    start_nbdkit "$@"
    run_client "$1" <<'END'
def done(error):
    assert error.value == 0
    return 1
byte = nbd.Buffer.from_bytearray(bytearray(b"x"))
for i in range(150000):
    client.aio_pwrite(byte, 65536 + i * 3, done)
    while client.aio_in_flight() > 60:
        client.poll(-1)
while client.aio_in_flight():
    client.poll(-1)
END
    peak=$(peak_memory "$1")
    stop_nbdkit "$1"
}

for work_done in conversion scattered pieces; do
    "$work_done" plain file "$work/target"
    without=$peak
    for size in 16 64; do
        "$work_done" filtered --filter="$FILTER" file "$work/target" qcowcache-size="${size}M"
        compare "$work_done" "$size" "$peak" "$without"
    done
done

conversion plain file "$work/target"
without=$peak
for size in 16 64; do
    conversion filtered --filter="$FILTER" file "$work/target" qcowcache-size="${size}M" \
        qcowcache-verify=error qcowcache-readback=true
    compare "conversion with verify and readback" "$size" "$peak" "$without"
done
[ "$missed" -eq 0 ] || fail "$missed figures are missed"
