#!/usr/bin/env bash
# Zeros and trims: over cached bytes, with ragged ends, larger than storage is
# asked for at once, and fast ones.

source "$(dirname "$0")/functions.sh"

fresh_image "$work/disk" 134218251 16
start_nbdkit server --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/below.log" \
    qcowcache-reserve=0 # for which a request may be larger
run_client server "$work/disk" <<'END'
size = client.get_size()

print("ragged ends of a zero")
client.pwrite(b"x" * 300000, 1 << 20)
client.zero(100000, (1 << 20) + 77777)
expected = b"x" * 77777 + bytes(100000) + b"x" * 122223
assert client.pread(300000, 1 << 20) == expected
client.flush()
assert client.pread(300000, 1 << 20) == expected

print("ragged ends of a trim stay as they are, or become zeros; what is beside it stays")
client.pwrite(b"y" * 300000, 2 << 20)
client.trim(100000, (2 << 20) + 77777)
found = client.pread(300000, 2 << 20)
assert found[:77777] == b"y" * 77777 and found[177777:] == b"y" * 122223
assert set(found[77777:177777]) <= set(b"y\0")
client.flush()
assert client.pread(300000, 2 << 20) == found

print("a write after a zero, inside one block")
client.zero(4096, 3 << 20)
client.pwrite(b"z", (3 << 20) + 1)
client.zero(1, (3 << 20) + 2)
client.pwrite(b"z", (3 << 20) + 3)
assert client.pread(5, 3 << 20) == b"\0z\0z\0"
client.zero(size - (3 << 20) - 3, (3 << 20) + 3)
assert client.pread(5, 3 << 20) == b"\0z\0\0\0"

print("100 MiB at once, over cached bytes at both ends, to an odd last byte")
client.pwrite(b"a" * 9000, (20 << 20) - 4500)
client.pwrite(b"b" * 9000, size - 9000)
client.zero(size - (20 << 20), 20 << 20)
assert client.pread(4500, (20 << 20) - 4500) == b"a" * 4500
assert client.pread(4500, 20 << 20) == bytes(4500)
assert client.pread(9000, size - 9000) == bytes(9000)
client.trim(size - (10 << 20), 10 << 20)
client.flush()
assert stored(arguments[0], 1 << 20, 300000) == expected
END
stop_nbdkit server
# The log has one line with each request's length.
awk '$4 == "Zero" || $4 == "Trim" { sub(/count=0x/, "", $7); if (length($7) > 7 || $7 > "2000000" && length($7) == 7) exit 1 }' \
    "$work/below.log" || fail "a zero or trim of more than 32 MiB reached storage"

echo "fast zeros"
start_nbdkit server --filter="$FILTER" memory 64M qcowcache-cluster-size=64K
run_client server <<'END'
assert client.can_fast_zero()
FAST = nbd.CMD_FLAG_FAST_ZERO
client.pwrite(b"q" * 200000, 1 << 20)

print("whole blocks")
client.zero(65536, 1 << 20, FAST)
assert client.pread(200000, 1 << 20) == bytes(65536) + b"q" * 134464

def fails(length, offset):
    before = client.pread(length, offset)
    error = error_of(lambda: client.zero(length, offset, FAST))
    assert error in (None, "ENOTSUP", "EOPNOTSUPP"), error
    assert client.pread(length, offset) == (before if error else bytes(length)), f"after {error}"

print("ragged ends, many pieces")
fails(100, (1 << 20) + 70000)
fails(70001, (1 << 20) + 65536)
fails(60 << 20, 1 << 20)
client.flush()
END
stop_nbdkit server

echo "storage without fast zeros says so"
fresh_file "$work/disk" 4M
start_nbdkit server --filter="$FILTER" --filter=nozero file "$work/disk" fastzeromode=none qcowcache-cluster-size=64K
run_client server <<'END'
assert not client.can_fast_zero()
client.pwrite(b"r" * 5000, 70000)
client.zero(5000, 70000)
assert client.pread(5000, 70000) == bytes(5000)
END
stop_nbdkit server

echo "storage that cannot zero or trim at all"
for lean in "zeromode=none" "zeromode=emulate" "zeromode=notrim"; do
    fresh_file "$work/disk" 4M
    start_nbdkit server --filter="$FILTER" --filter=nozero file "$work/disk" "$lean" qcowcache-cluster-size=64K
    run_client server "$work/disk" <<'END'
client.pwrite(b"s" * (1 << 20), 12345)
client.zero(500001, 100003)
expected = b"s" * (100003 - 12345) + bytes(500001) + b"s" * ((1 << 20) - 500001 - (100003 - 12345))
assert client.pread(1 << 20, 12345) == expected
client.flush()
assert stored(arguments[0], 12345, 1 << 20) == expected
END
    stop_nbdkit server
done
