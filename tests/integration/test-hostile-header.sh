#!/usr/bin/env bash
# Headers that are cut off, or that say what no image says: such a file passes
# through, and nothing crashes or allocates by what it says.

source "$(dirname "$0")/functions.sh"

# passes_odd_writes WHAT: odd writes of a client are in $work/disk when acknowledged
passes_odd_writes ()
{
    local size
    size=$(stat -c %s "$work/disk")
    start_nbdkit server --filter="$FILTER" file "$work/disk"
    run_client server "$work/disk" "$1" <<'END'
size = client.get_size()
for step in range(20):
    offset = size * step // 20
    # The header stays as it is while there is anything else to write to.
    if size > 8192:
        offset = max(offset, 4096 + step)
    elif offset < 24 and size > 24:
        offset = 24
    data = bytes([step + 1]) * min(333, size - offset)
    client.pwrite(data, offset)
    assert stored(arguments[0], offset, len(data)) == data, f"{arguments[1]}: a write was held back"
    assert client.pread(len(data), offset) == data
client.flush()
END
    stop_nbdkit server
    [ "$(stat -c %s "$work/disk")" -eq "$size" ] || fail "$1: the file has another size"
}

for bits in 0 8 22 63 64 255 4294967295; do
    fresh_image "$work/disk" 2M "$bits"
    passes_odd_writes "cluster_bits $bits"
done
for version in 0 1 4 99 4294967295; do
    fresh_file "$work/disk" 2M
    write_header "$work/disk" 16 "$version"
    passes_odd_writes "version $version"
done
for length in 1 3 4 7 8 20 23 24 48 71; do
    fresh_image "$work/disk" 112 16
    truncate -s "$length" "$work/disk"
    passes_odd_writes "cut off after $length bytes"
done

# Every other field, set to what does harm where it is believed: the bytes of
# the client must arrive, cached or not.
fresh_file "$work/disk" 2M
start_nbdkit server --filter="$FILTER" file "$work/disk"
python "$work/server.sock" "$work/disk" <<'END'
import sys
from nbd_clients import connect, image_header, stored

fields = {
    "backing_file_offset": (8, 8), "backing_file_size": (16, 4), "size": (24, 8),
    "crypt_method": (32, 4), "l1_size": (36, 4), "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8), "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4), "snapshots_offset": (64, 8), "incompatible_features": (72, 8),
    "compatible_features": (80, 8), "autoclear_features": (88, 8), "refcount_order": (96, 4),
    "header_length": (100, 4), "compression_type": (104, 1),
}
value = 0
for name, (position, width) in fields.items():
    for pattern in (b"\xff" * width, b"\x7f" + b"\xff" * (width - 1), bytes(width - 1) + b"\x01"):
        hostile = bytearray(image_header(length=512))
        hostile[position:position + width] = pattern
        for sent in (bytes(hostile), image_header(length=512)):
            value = value % 255 + 1
            client = connect(sys.argv[1])
            data = bytes([value]) * 3000
            client.pwrite(sent, 0)
            client.pwrite(data, 65000)
            client.pwrite(data, 1 << 20)
            assert client.pread(3000, 65000) == data, name
            # In pieces, as clients write it too.
            for piece in range(0, 512, 50):
                client.pwrite(sent[piece:piece + 50], piece)
            client.pwrite(data, 200001)
            client.flush()
            for offset in (65000, 1 << 20, 200001):
                assert stored(sys.argv[2], offset, 3000) == data, name
            assert stored(sys.argv[2], 0, 512) == sent, name
            client.shutdown()
END

# A header that goes while bytes are cached: these are still read, and stored.
run_client server "$work/disk" <<'END'
client.pwrite(image_header(), 0)
client.pwrite(b"cached" * 500, 300001)
client.zero(512, 0)
client.pwrite(b"beside", 303001)
client.pwrite(b"over", 300001)
assert client.pread(3006, 300001) == b"over" + (b"cached" * 500)[4:] + b"beside"
client.pwrite(image_header(), 0)
client.pwrite(b"again", 303007)
client.flush()
assert stored(arguments[0], 300001, 3011) == b"over" + (b"cached" * 500)[4:] + b"beside" + b"again"
END
stop_nbdkit server
