#!/usr/bin/env bash
# Exports of sizes that fit nothing: of no byte, of one, of a few, and of many TiB.

source "$(dirname "$0")/functions.sh"

# use SERVER: first and last bytes, and everything where that is little
use ()
{
    python "$work/$1.sock" <<'END'
import nbd, sys
from nbd_clients import connect, error_of
client = connect(sys.argv[1], strict=False)
size = client.get_size()
if size == 0:
    client.flush()
else:
    for round in range(2):
        client.pwrite(b"f", 0)
        client.pwrite(b"l", size - 1)
        assert client.pread(1, 0) == (b"l" if size == 1 else b"f")
        assert client.pread(1, size - 1) == b"l"
        client.flush()
        client.pwrite(b"m", size // 2, nbd.CMD_FLAG_FUA)
        assert client.pread(1, size // 2) == b"m"
        tail = min(size, 70001)
        client.pwrite(b"t" * tail, size - tail)
        client.zero(min(tail, 5000), size - min(tail, 5000))
        client.pwrite(b"e", size - 1)
        expected = b"t" * (tail - min(tail, 5000)) + bytes(min(tail, 5000) - 1) + b"e"
        assert client.pread(tail, size - tail) == expected
for offset, length in (size, 1), (max(size - 1, 0), 2):
    assert error_of(lambda: client.pwrite(b"x" * length, offset)), "a write behind the end succeeded"
assert client.get_size() == size
client.shutdown()
END
}

for size in 0 1 2 511 513 4095 4097 65535 65537 1048577; do
    for parameters in "" qcowcache-cluster-size=512 qcowcache-cluster-size=64K qcowcache-cluster-size=2M; do
        fresh_file "$work/disk" "$size"
        start_nbdkit server --filter="$FILTER" file "$work/disk" ${parameters:+"$parameters"}
        use server
        stop_nbdkit server
        [ "$(stat -c %s "$work/disk")" -eq "$size" ] || fail "$size $parameters: the file has another size"
        if [ "$size" -gt 0 ]; then
            [ "$(tail -c 1 "$work/disk")" = e ] || fail "$size $parameters: the last byte is not stored"
        fi
    done
done

# Images in such files, and what the beginning of an image's header leaves of one.
for size in 1 3 4 7 8 20 23 24 48 71 112 511 4097 65537 1048577; do
    fresh_image "$work/disk" 112 16
    truncate -s "$size" "$work/disk"
    start_nbdkit server --filter="$FILTER" file "$work/disk"
    use server
    stop_nbdkit server
    [ "$(stat -c %s "$work/disk")" -eq "$size" ] || fail "$size: the file has another size"
    [ "$(tail -c 1 "$work/disk")" = e ] || fail "$size: the last byte is not stored"
done

for size in 8T 9007199254740993 4611686018427387905 9223372036854775807; do
    for parameters in "" qcowcache-cluster-size=64K qcowcache-cluster-size=2M; do
        start_nbdkit server --filter="$FILTER" memory "$size" ${parameters:+"$parameters"}
        use server
        stop_nbdkit server
    done
done

# A conversion that ends at the last byte of a target of an odd size.
make_tar_image "$work/source" 4M
convert "$work/source" "$work/image" 64k zlib
size=$(stat -c %s "$work/image")
fresh_file "$work/disk" "$size"
start_nbdkit server --filter="$FILTER" file "$work/disk"
nbdcopy --request-size=4096 "$work/image" "$(uri server)"
stop_nbdkit server
cmp "$work/image" "$work/disk"
