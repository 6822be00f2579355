#!/usr/bin/env bash
# One client writes and never flushes, another reads: each acknowledged byte is
# there for the reader at once, whatever has been written to storage by then.

source "$(dirname "$0")/functions.sh"

fresh_file "$work/disk" 8388731
start_nbdkit server --filter="$FILTER" file "$work/disk" \
    qcowcache-cluster-size=64k qcowcache-size=1M

python "$work/server.sock" <<'END'
import random, sys
from nbd_clients import Model, Ranges, connect

dice = random.Random(7)
writer = connect(sys.argv[1])
reader = connect(sys.argv[1])
size = writer.get_size()
model = Model(bytearray(size))
ranges = Ranges(dice, size, first=0)
for step in range(3000):
    begin, end = ranges.some()
    data = dice.randbytes(end - begin)
    writer.pwrite(data, begin)
    model.is_(begin, data)
    begin, end = max(0, begin - dice.randrange(5000)), min(size, end + dice.randrange(5000))
    model.same(reader.pread(end - begin, begin), begin, f"step {step}")
model.same(reader.pread(size, 0), 0, "in the end")
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
