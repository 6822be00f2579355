#!/usr/bin/env bash
# Headers that are cut off, or that say what no image says: such a file passes
# through, and nothing crashes or allocates by what it says.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

# passes_odd_writes WHAT: odd writes of a client are in $work/disk when acknowledged
passes_odd_writes ()
{
    local size
    size=$(stat -c %s "$work/disk")
    start_nbdkit server --filter="$FILTER" file "$work/disk"
    python "$work/server.sock" "$work/disk" "$1" <<'END'
import nbd, sys
client = nbd.NBD()
client.connect_unix(sys.argv[1])
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
    with open(sys.argv[2], "rb") as stored:
        stored.seek(offset)
        assert stored.read(len(data)) == data, f"{sys.argv[3]}: a write was held back"
    assert client.pread(len(data), offset) == data
client.flush()
END
    stop_nbdkit server
    [ "$(stat -c %s "$work/disk")" -eq "$size" ] || fail "$1: the file has another size"
}

for bits in 0 8 22 63 64 255 4294967295; do
    fresh_file "$work/disk" 2M
    write_header "$work/disk" "$bits"
    passes_odd_writes "cluster_bits $bits"
done
for version in 0 1 4 99 4294967295; do
    fresh_file "$work/disk" 2M
    write_header "$work/disk" 16 "$version"
    passes_odd_writes "version $version"
done
for length in 1 3 4 7 8 20 23 24 48 71; do
    fresh_file "$work/disk" 112
    write_header "$work/disk" 16
    truncate -s "$length" "$work/disk"
    passes_odd_writes "cut off after $length bytes"
done

# Every other field, set to what does harm where it is believed: the bytes of
# the client must arrive, cached or not.
fresh_file "$work/disk" 2M
start_nbdkit server --filter="$FILTER" file "$work/disk"
python "$work/server.sock" "$work/disk" <<'END'
import nbd, struct, sys

def header():
    result = bytearray(512)
    result[0:8] = b"QFI\xfb" + struct.pack(">I", 3)
    result[20:32] = struct.pack(">IQ", 16, 1 << 20)
    result[96:104] = struct.pack(">II", 4, 112)
    return result

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
        hostile = header()
        hostile[position:position + width] = pattern
        for sent in (hostile, header()):
            value = value % 255 + 1
            client = nbd.NBD()
            client.connect_unix(sys.argv[1])
            data = bytes([value]) * 3000
            client.pwrite(bytes(sent), 0)
            client.pwrite(data, 65000)
            client.pwrite(data, 1 << 20)
            assert client.pread(3000, 65000) == data, name
            # In pieces, as clients write it too.
            for piece in range(0, 512, 50):
                client.pwrite(bytes(sent[piece:piece + 50]), piece)
            client.pwrite(data, 200001)
            client.flush()
            stored = open(sys.argv[2], "rb").read()
            for offset in (65000, 1 << 20, 200001):
                assert stored[offset:offset + 3000] == data, name
            assert stored[:512] == sent, name
            client.shutdown()
END

# A header that goes while bytes are cached: these are still read, and stored.
python "$work/server.sock" "$work/disk" <<'END'
import nbd, struct, sys
client = nbd.NBD()
client.connect_unix(sys.argv[1])
good = bytearray(112)
good[0:8] = b"QFI\xfb" + struct.pack(">I", 3)
good[20:32] = struct.pack(">IQ", 16, 1 << 20)
good[96:104] = struct.pack(">II", 4, 112)
client.pwrite(bytes(good), 0)
client.pwrite(b"cached" * 500, 300001)
client.zero(512, 0)
client.pwrite(b"beside", 303001)
client.pwrite(b"over", 300001)
assert client.pread(3006, 300001) == b"over" + (b"cached" * 500)[4:] + b"beside"
client.pwrite(bytes(good), 0)
client.pwrite(b"again", 303007)
client.flush()
stored = open(sys.argv[2], "rb").read()
assert stored[300001:303012] == b"over" + (b"cached" * 500)[4:] + b"beside" + b"again"
END
stop_nbdkit server
