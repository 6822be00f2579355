#!/usr/bin/env bash
# Storage that refuses requests which do not fit its blocks: clients may send
# what they like, with and without a qcow2 image.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

make_tar_image "$work/source" 24M
target=$work/target.qcow2

for minimum in 512 4096 64K; do
    echo "blocks of $minimum"
    policy=(blocksize-minimum="$minimum" blocksize-preferred=64K blocksize-error-policy=error)
    for order in "" "-W -m 16"; do
        read -r -a options <<<"$order"
        fresh_file "$target" 48M
        start_nbdkit server --filter="$FILTER" --filter=blocksize-policy file "$target" "${policy[@]}"
        convert "$work/source" "$(uri server)" 4k zlib "${options[@]}"
        qemu-img compare -q -f raw -F qcow2 "$work/source" "$(uri server)"
        stop_nbdkit server
        image_holds "$target" "$work/source"
    done

    # No image: nothing is cached, but every request is made to fit.  The file
    # is no whole number of blocks, and what does not fit cannot be used.
    for header in none 64K; do
        parameters=()
        if [ "$header" = 64K ]; then parameters=(qcowcache-cluster-size=64K); fi
        fresh_file "$work/disk" $(((3 << 20) + 300))
        start_nbdkit server --filter="$FILTER" --filter=blocksize-policy --filter=log file "$work/disk" \
            "${policy[@]}" logfile="$work/below.log" "${parameters[@]}"
        python "$work/server.sock" "$work/disk" <<'END'
import nbd, random, sys
random.seed(3)
client = nbd.NBD()
client.add_meta_context("base:allocation")
client.connect_unix(sys.argv[1])
size = client.get_size()
assert size == 3 << 20, f"size {size}"
model = bytearray(size)
for step in range(400):
    length = random.choice([1, 2, 511, 513, 4095, 4096, 30000, 65536, 200000])
    offset = random.choice([random.randrange(size - length), size - length])
    kind = random.choice("wwwFzrrbct")
    if kind in "wF":
        data = random.randbytes(length)
        client.pwrite(data, offset, nbd.CMD_FLAG_FUA if kind == "F" else 0)
        model[offset:offset + length] = data
    elif kind == "z":
        client.zero(length, offset)
        model[offset:offset + length] = bytes(length)
    elif kind == "t":
        client.trim(length, offset)
        # Either content is right after a trim; from here on it is what was found.
        model[offset:offset + length] = client.pread(length, offset)
    elif kind == "b":
        client.block_status(length, offset, lambda *ignored: 0)
    elif kind == "c":
        client.cache(length, offset)
    else:
        assert client.pread(length, offset) == model[offset:offset + length], f"step {step}"
client.flush()
assert client.pread(size, 0) == model
with open(sys.argv[2], "rb") as stored:
    assert stored.read(size) == model
END
        stop_nbdkit server
    done
done

echo "requests of at most 128K"
for parameters in "" "qcowcache-cluster-size=64K" "qcowcache-cluster-size=2M"; do
    read -r -a more <<<"$parameters"
    fresh_file "$work/disk" 16M
    start_nbdkit server --filter="$FILTER" --filter=blocksize-policy file "$work/disk" \
        blocksize-minimum=512 blocksize-maximum=128K blocksize-error-policy=error "${more[@]}"
    python "$work/server.sock" "$work/disk" <<'END'
import nbd, random, sys
random.seed(4)
client = nbd.NBD()
client.set_strict_mode(0)
client.connect_unix(sys.argv[1])
data = random.randbytes(5 << 20)
client.pwrite(data, 1001)
client.pwrite(data, 6 << 20, nbd.CMD_FLAG_FUA)
assert client.pread(5 << 20, 1001) == data
client.zero(3 << 20, 100003)
client.flush()
expected = bytearray(16 << 20)
expected[1001:1001 + len(data)] = data
expected[6 << 20:(6 << 20) + len(data)] = data
expected[100003:100003 + (3 << 20)] = bytes(3 << 20)
assert client.pread(16 << 20, 0) == expected
with open(sys.argv[2], "rb") as stored:
    assert stored.read() == expected
END
    stop_nbdkit server
done
