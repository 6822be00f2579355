#!/usr/bin/env bash
# One client writes and never flushes, another reads: each acknowledged byte is
# there for the reader at once, whatever has been written to storage by then.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

fresh_file "$work/disk" 8388731
start_nbdkit server --filter="$FILTER" file "$work/disk" \
    qcowcache-cluster-size=64k qcowcache-size=1M

python "$work/server.sock" <<'END'
import nbd, random, sys

random.seed(7)
writer = nbd.NBD()
writer.connect_unix(sys.argv[1])
reader = nbd.NBD()
reader.connect_unix(sys.argv[1])
size = writer.get_size()
model = bytearray(size)
position = 0
for step in range(3000):
    if random.random() < 0.8:
        # As qcow2 clients do: mostly behind the last write.
        offset = position
    else:
        offset = random.randrange(size)
    length = min(random.choice([1, 300, 4096, 9001, 65536]), size - offset)
    data = random.randbytes(length)
    writer.pwrite(data, offset)
    model[offset:offset + length] = data
    position = (offset + length) % size
    begin = max(0, offset - random.randrange(5000))
    end = min(size, offset + length + random.randrange(5000))
    assert reader.pread(end - begin, begin) == model[begin:end], f"step {step}: old bytes near {offset}"
assert reader.pread(size, 0) == model
END

# A second process reads while a conversion runs; it must neither disturb it nor fail.
stop_nbdkit server
make_tar_image "$work/source" 16M
fresh_file "$work/target" 32M
start_nbdkit server --filter="$FILTER" file "$work/target" qcowcache-size=1M
convert "$work/source" "$(uri server)" 64k zstd -W -m 16 &
client=$!
while kill -0 "$client" 2>/dev/null; do
    nbdcopy "$(uri server)" null:
done
wait "$client"
stop_nbdkit server
image_holds "$work/target" "$work/source"
