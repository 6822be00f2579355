#!/usr/bin/env bash
# A good image that is uploaded as it is, from front to back, with flushes
# between: with qcowcache-verify=error none of them fails, or waits, for what has
# not come yet.  One that ends too early has failed, and so has one whose header
# nobody can open.

source "$(dirname "$0")/functions.sh"

# upload.py SOCKET IMAGE PIECES: of 32, with a flush after each
cat >"$work/upload.py" <<'END'
import sys, time
from nbd_clients import connect

socket, image, pieces = sys.argv[1:]
good = open(image, "rb").read()
good += bytes(-len(good) % 512)
piece = -(-len(good) // 32 // 512) * 512
client = connect(socket)
began = time.monotonic()
for number in range(int(pieces)):
    if part := good[number * piece:(number + 1) * piece]:
        client.pwrite(part, number * piece)
    client.flush()
took = time.monotonic() - began
client.shutdown()
print(f"{pieces} flushes: {took:.2f} s")
# Each of those that wait, waits for 2 s.
assert took < 20, "flushes have waited"
END

from_stats () { jq -r ".total.$1" "$work/stats.json"; }

make_tar_image "$work/source" 8M
for type in zlib zstd; do
    convert "$work/source" "$work/$type.qcow2" 64k "$type"
    # On an empty disk, and on one with another image's data.
    for old in "" "$work/source"; do
        fresh_file "$work/disk" 16M
        [ -z "$old" ] || dd if="$old" of="$work/disk" bs=1M conv=notrunc status=none
        start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-verify=error \
            qcowcache-stats="$work/stats.json"
        "$PYTHON" "$work/upload.py" "$work/server.sock" "$work/$type.qcow2" 32
        stop_nbdkit server
        ! grep qcowcache "$work/server.err" || fail "an alarm for a good image"
        for count in unreadable_clusters unreadable_alarms; do
            [ "$(from_stats $count)" -eq 0 ] || fail "$count is $(from_stats $count) for a good image"
        done
        [ "$(from_stats verified_deflate_clusters)" -gt 50 ] || [ "$(from_stats verified_zstd_clusters)" -gt 50 ] ||
            fail "hardly anything was checked: $(cat "$work/stats.json")"
        image_holds "$work/disk" "$work/source"
    done
done

echo "one that ends too early"
fresh_file "$work/disk" 16M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-verify=error \
    qcowcache-stats="$work/stats.json"
cp "$work/zlib.qcow2" "$work/whole"
# The entries come first: so nearly all of them are awaited.
python "$work/whole" "$work/first" <<'END'
import struct, sys
from qcow2 import CompressedClusters
image = bytearray(open(sys.argv[1], "rb").read())
found = CompressedClusters(image)
# A table in place of the refcounts, which nobody looks at here.
image[131072:131072 + 65536] = image[found.l2:found.l2 + 65536]
image[found.l1:found.l1 + 8] = struct.pack(">Q", 131072)
open(sys.argv[2], "wb").write(image)
END
"$PYTHON" "$work/upload.py" "$work/server.sock" "$work/first" 20
is_reported () { grep -q 'qcowcache: export "": .* cannot be read' "$work/server.err"; }
wait_until 30 is_reported || fail "not reported: $(cat "$work/server.err")"
if nbdsh -u "$(uri server)" -c 'h.flush()' 2>"$work/flush.err"; then
    fail "a later client's flush succeeds"
fi
"$PYTHON" "$work/upload.py" "$work/server.sock" "$work/first" 32 || fail "all of it is there, and it is refused"
stop_nbdkit server
[ "$(from_stats unreadable_clusters)" -eq 0 ] || fail "unreadable, though it can be read"
[ "$(from_stats unreadable_alarms)" -gt 0 ] || fail "no alarm is counted"

echo "a header that nobody can open"
cp "$work/zlib.qcow2" "$work/disk"
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-verify=error
run_client server <<'END'
client.pwrite(b"\1", 104)
assert error_of(client.flush) == "EIO", "the flush succeeds"
client.pwrite(b"\0", 104)
client.flush()
client.shutdown()
END
stop_nbdkit server
grep -q 'qcowcache: export "": nobody can open the image: .* feature bit' "$work/server.err" ||
    fail "not said: $(cat "$work/server.err")"
