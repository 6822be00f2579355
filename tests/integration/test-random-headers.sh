#!/usr/bin/env bash
# Headers with each field at its extremes, and with random bytes.  What is no
# image to work on passes through, byte by byte and at once; what is one is
# cached in units of its clusters; and no field makes the filter take memory.
#
#   SEED=N    repeat a run (each prints its seed)
#   COUNT=N   this many random headers (150)

source "$(dirname "$0")/functions.sh"

: "${SEED:=$RANDOM}" "${COUNT:=150}"
echo "SEED=$SEED"

fresh_file "$work/disk" 8M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-expire=0
python "$work/server.sock" "$work/disk" "$SEED" "$COUNT" <<'END' || fail "SEED=$SEED repeats it"
import random, sys
from nbd_clients import connect, image_header

address, disk, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
SIZE = 8 << 20
FIELDS = {
    "magic": (0, 4), "version": (4, 4), "backing_file_offset": (8, 8), "backing_file_size": (16, 4),
    "cluster_bits": (20, 4), "size": (24, 8), "crypt_method": (32, 4), "l1_size": (36, 4),
    "l1_table_offset": (40, 8), "refcount_table_offset": (48, 8), "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4), "snapshots_offset": (64, 8), "incompatible_features": (72, 8),
    "compatible_features": (80, 8), "autoclear_features": (88, 8), "refcount_order": (96, 4),
    "header_length": (100, 4), "compression_type": (104, 1),
}
storage = open(disk, "r+b", buffering=0)
dice = random.Random(seed)
seen = {True: 0, False: 0}

def sound(version):
    return bytearray(image_header(16, version, 512))

def field(header, name):
    position, width = FIELDS[name]
    return int.from_bytes(header[position:position + width], "big")

def cluster_size(header):
    """Of an image that can have compressed clusters; None of anything else."""
    bits, version = field(header, "cluster_bits"), field(header, "version")
    if header[0:4] != b"QFI\xfb" or version not in (2, 3) or not 9 <= bits <= 21:
        return None
    if field(header, "crypt_method") >= 2:
        return None
    if version == 3:
        features, length = field(header, "incompatible_features"), field(header, "header_length")
        compression = field(header, "compression_type") if length > 104 else 0
        if features & 4 or not 104 <= length <= 1 << bits or field(header, "refcount_order") > 6:
            return None
        if features & 16 and bits < 14:
            return None
        if compression > 1 or (compression == 1) != bool(features & 8):
            return None
    return 1 << bits

def stored(offset, length):
    storage.seek(offset)
    return storage.read(length)

def try_header(header, what):
    storage.seek(0)
    storage.write(header)
    cluster = cluster_size(header)
    seen[cluster is not None] += 1
    # A name that nobody used before: what is known of the others may still be in use.
    client = connect(address, str(sum(seen.values())))
    for step in range(3):
        offset = dice.choice([512, 4095, 65500, 1 << 20, SIZE - 777]) + dice.randrange(400)
        data = dice.randbytes(dice.choice([1, 100, 377]))
        client.pwrite(data, offset)
        assert client.pread(len(data), offset) == data, f"{what}: another byte is read"
        if cluster is None:
            assert stored(offset, len(data)) == data, f"{what}: a write was held back"
        elif len(data) > 1:
            assert stored(offset, len(data)) != data, f"{what}: a write went through"
    client.flush()
    assert stored(offset, len(data)) == data, f"{what}: a byte is not stored"
    assert stored(0, 512) == header, f"{what}: the header has changed"
    client.shutdown()

for name, (position, width) in FIELDS.items():
    most = (1 << 8 * width) - 1
    values = {0, 1, 2, 3, most, most - 1, most >> 1, (most >> 1) + 1, 1 << 31 & most, 1 << 16 & most}
    if name == "cluster_bits":
        values |= {8, 9, 13, 14, 21, 22, 31, 32, 63, 64}
    elif name == "header_length":
        values |= {71, 72, 103, 104, 105, 112, 512, 65535, 65536, 65537}
    elif name == "incompatible_features":
        values |= {1 << bit for bit in range(64)}
    elif name == "refcount_order":
        values |= {6, 7}
    for version in 2, 3:
        for value in sorted(values):
            header = sound(version)
            header[position:position + width] = value.to_bytes(width, "big")
            try_header(header, f"version {version}, {name} {value:#x}")

for number in range(count):
    header = sound(dice.choice([2, 3]))
    for _ in range(dice.randrange(1, 4)):
        position, width = FIELDS[dice.choice(list(FIELDS))]
        small = dice.randrange(24).to_bytes(width, "big")
        header[position:position + width] = dice.choice([small, dice.randbytes(width)])
    if number % 10 == 0:
        header[4:] = dice.randbytes(508)
    try_header(header, f"random header {number}: {header[:112].hex()}")

print(f"{seen[True]} headers of images, {seen[False]} of none")
assert seen[True] > 100 and seen[False] > 100
END
peak=$(peak_memory server)
stop_nbdkit server
echo "peak memory $peak KiB"
# Units of 2 MiB at most, a few of them at a time.
[ "$peak" -lt $((64 * 1024)) ] || fail "headers made the filter take $peak KiB"
