#!/usr/bin/env bash
# One bit flipped in one compressed cluster, many times over: each flip whose
# cluster does not decode any more is refused, and no other is.  Prints how many
# those are: most flips leave a stream that decodes to one whole, wrong cluster.
#
# LONG=1: 1000 flips for each codec instead of 60.

source "$(dirname "$0")/functions.sh"

count=60
size=16M
if [ "${LONG:-}" = 1 ]; then
    count=1000
    size=128M
fi
make_tar_image "$work/source" "$size"

for type in zlib zstd; do
    convert "$work/source" "$work/good.qcow2" 64k "$type"
    truncate -s %65536 "$work/good.qcow2"
    cp "$work/good.qcow2" "$work/disk"
    # Nothing is late where requests come one at a time.
    start_nbdkit server --filter="$FILTER" --filter=noparallel file "$work/disk" qcowcache-verify=error
    run_client server "$work/good.qcow2" "$type" "$count" <<'END'
import ctypes, zlib

image, codec, count = arguments
good = open(image, "rb").read()
random.seed(3)
clusters = CompressedClusters(good)
cluster, entries = clusters.cluster, clusters.entries

if codec == "zstd":
    zstd = ctypes.CDLL("libzstd.so.1")
    for name in ("ZSTD_findFrameCompressedSize", "ZSTD_decompress"):
        getattr(zstd, name).restype = ctypes.c_size_t

def decodes(data):
    """By other means than the filter's own: zlib's and zstd's decoders for Python and for C."""
    if codec == "zlib":
        decoder = zlib.decompressobj(-12)
        try:
            output = decoder.decompress(data, cluster + 1)
        except zlib.error:
            return False
        return decoder.eof and len(output) == cluster
    size = ctypes.c_size_t(len(data))
    frame = zstd.ZSTD_findFrameCompressedSize(data, size)
    if zstd.ZSTD_isError(ctypes.c_size_t(frame)):
        return False
    output = ctypes.create_string_buffer(cluster)
    return zstd.ZSTD_decompress(output, ctypes.c_size_t(cluster), data, ctypes.c_size_t(frame)) == cluster

assert len(entries) >= int(count), f"only {len(entries)} compressed clusters"


def put(index, entry):
    client.pwrite(struct.pack(">Q", entry), clusters.l2 + index * 8)

refused = 0
for index in random.sample(sorted(entries), int(count)):
    entry = entries[index]
    offset, length = clusters.place(entry)
    original = good[offset:offset + length]
    if codec == "zlib":
        decoder = zlib.decompressobj(-12)
        decoder.decompress(original)
        stream = length - len(decoder.unused_data)
    else:
        stream = zstd.ZSTD_findFrameCompressedSize(original, ctypes.c_size_t(length))
    bit = random.randrange(stream * 8)
    flipped = bytearray(original)
    flipped[bit // 8] ^= 1 << bit % 8
    put(index, 0)
    client.flush()
    client.pwrite(bytes([flipped[bit // 8]]), offset + bit // 8)
    put(index, entry)
    expected = decodes(bytes(flipped))
    error = error_of(client.flush)
    assert error in (None, "EIO"), error
    accepted = not error
    assert accepted == expected, f"host {offset} bit {bit}: decodes {expected}, flush {accepted}"
    refused += not accepted
    client.pwrite(original[bit // 8:bit // 8 + 1], offset + bit // 8)
    client.flush()
print(f"{codec}: {refused} of {count} clusters with one flipped bit do not decode, and are refused")
assert refused, "not one flip was refused"
END
    stop_nbdkit server
    cmp "$work/disk" "$work/good.qcow2"
done
