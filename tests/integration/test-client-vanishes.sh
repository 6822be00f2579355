#!/usr/bin/env bash
# A client writes the bytes of a prepared image and is gone, without a flush and
# without taking leave: everything that was acknowledged to it is stored, while
# the server lives on.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 24M
convert "$work/source" "$work/prepared.qcow2" 64k zstd
size=$(stat -c %s "$work/prepared.qcow2")
cp "$work/prepared.qcow2" "$work/expected"
# Room behind the image, so that nothing but the client's going completes its
# last piece.
truncate -s +100777 "$work/expected"
room=$(stat -c %s "$work/expected")
target=$work/target.qcow2

for order in header-first header-last; do
    fresh_file "$target" "$room"
    start_nbdkit server --filter="$FILTER" file "$target"
    # os._exit closes the socket as a kill does: libnbd says no goodbye.
    run_client server "$work/prepared.qcow2" "$order" <<'END'
image = open(arguments[0], "rb").read()
random.seed(len(image))
pieces = []
position = 0
while position < len(image):
    length = random.choice([1, 511, 4096, 9000, 26700, 65536, 200000])
    pieces.append((position, image[position:position + length]))
    position += length
if arguments[1] == "header-last":
    pieces.append(pieces.pop(0))
for position, piece in pieces:
    client.pwrite(piece, position)
os._exit(0)
END
    wait_until 30 cmp -s "$target" "$work/expected" ||
        fail "$order: bytes that were acknowledged are not stored"
    stop_nbdkit server
    cmp "$target" "$work/expected"
    image_holds "$target" "$work/source"
done

# The same, killed at some moment in the middle.  It has no write in flight then:
# nbdkit 1.32.5 itself can abort when it has several replies for a dead client.
[ "$size" -gt $((65536 + 700 * 5003)) ] || fail "the image is too small"
for acknowledged in 1 7 50 333 700; do
    fresh_file "$target" "$room"
    start_nbdkit server --filter="$FILTER" file "$target"
    killed=0
    run_client server "$work/prepared.qcow2" "$acknowledged" <<'END' || killed=$?
import signal
image = open(arguments[0], "rb").read()
client.pwrite(image[:65536], 0)
for i in range(int(arguments[1])):
    position = 65536 + i * 5003
    client.pwrite(image[position:position + 5003], position)
os.kill(os.getpid(), signal.SIGKILL)
END
    [ "$killed" -eq 137 ] || fail "the client was not killed (status $killed)"
    stop_nbdkit server
    cmp -n $((65536 + acknowledged * 5003)) "$target" "$work/prepared.qcow2" ||
        fail "killed after $acknowledged writes: acknowledged bytes are lost"
done

# Filters that wait refuse to do so on behalf of a client that has gone; and storage that
# serves one request or one client at a time has its locks still held.
python "$work/expected" <<'END'
import sys
expected = bytearray(2 << 20)
for i in range(20):
    expected[i * 100003:i * 100003 + 3000] = bytes([i + 1]) * 3000
open(sys.argv[1], "wb").write(expected)
END
for slow in "delay wdelay=5ms" "rate rate=100M" "retry retries=1"; do
    read -r filter parameter <<<"$slow"
    for model in "" requests all-requests connections; do
        fresh_file "$target" 2M
        start_nbdkit server --filter="$FILTER" ${model:+"--filter=noparallel"} --filter="$filter" \
            file "$target" "$parameter" ${model:+"serialize=$model"} qcowcache-cluster-size=64K
        run_client server <<'END'
for i in range(20):
    client.pwrite(bytes([i + 1]) * 3000, i * 100003)
os._exit(0)
END
        # Told to end, these filters refuse everything at once: so not before.
        wait_until 30 cmp -s "$target" "$work/expected" || fail "$slow $model: bytes are lost"
        stop_nbdkit server
        cmp "$target" "$work/expected"
    done
done
