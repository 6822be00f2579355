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

# One client holds all memory with bytes that complete nothing, and idles: the
# other one's writes are served all the same, and nothing of either is lost.
rm -f "$work/exports/"*
for name in idle busy; do
    fresh_file "$work/exports/$name" 16M
done
start_nbdkit server --filter="$FILTER" file dir="$work/exports" \
    qcowcache-cluster-size=64K qcowcache-size=512K
timeout 120 "$PYTHON" - "$work/server.sock" <<'END' || fail "one export starves another one"
import sys
from nbd_clients import connect

idle = connect(sys.argv[1], "idle")
busy = connect(sys.argv[1], "busy")
for i in range(100):
    idle.pwrite(b"idle", i * 65536 + 11)
for i in range(1000):
    busy.pwrite(bytes([i % 250 + 1]) * 9001, i * 9001)
for i in range(100):
    assert idle.pread(4, i * 65536 + 11) == b"idle"
for i in range(1000):
    assert busy.pread(9001, i * 9001) == bytes([i % 250 + 1]) * 9001
END
stop_nbdkit server
python "$work/exports/idle" "$work/exports/busy" <<'END'
import sys
idle, busy = (open(name, "rb").read() for name in sys.argv[1:])
assert all(idle[i * 65536 + 11:i * 65536 + 15] == b"idle" for i in range(100))
assert all(busy[i * 9001:(i + 1) * 9001] == bytes([i % 250 + 1]) * 9001 for i in range(1000))
END
