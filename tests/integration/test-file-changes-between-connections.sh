#!/usr/bin/env bash
# Between two connections a file is edited, replaced, grown and shrunk: the next
# connection sees it as it is, because nothing is remembered without a client.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 8M
convert "$work/source" "$work/disk" 64k zlib
truncate -s 16M "$work/disk"
start_nbdkit server --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/below.log"

connections=0
# client PROGRAM: run it as one connection, named "client", to its end.
client ()
{
    run_client server <<<"$1"
    connections=$((connections + 1))
    # Storage sees the connection end after the filter has let go of it.
    wait_until 30 connection_has_ended "$connections" || fail "the connection does not end"
}
connection_has_ended () { [ "$(grep -c ' Disconnect ' "$work/below.log")" -ge "$1" ]; }

echo "learns the file, leaves clean, partial and full units"
client "
client.pread(1 << 20, 8 << 20)
client.pwrite(b'a' * 65536, 9 << 20)
client.pwrite(b'b' * 5000, (9 << 20) + 70001)
client.flush()
client.pwrite(b'c' * 3000, 10 << 20)
"

echo "edited"
printf 'edited' | dd of="$work/disk" bs=1 seek=$((9 << 20)) conv=notrunc status=none
printf 'edited' | dd of="$work/disk" bs=1 seek=$(((9 << 20) + 70001)) conv=notrunc status=none
printf 'edited' | dd of="$work/disk" bs=1 seek=$(((10 << 20) + 3000)) conv=notrunc status=none
printf 'edited' | dd of="$work/disk" bs=1 seek=$((12 << 20)) conv=notrunc status=none
client "
assert client.pread(8, 9 << 20) == b'editedaa'
assert client.pread(8, (9 << 20) + 70001) == b'editedbb'
assert client.pread(9, (10 << 20) + 2997) == b'cccedited'
# What was a hole is data now: filling up around this byte must keep it.
client.pwrite(b'd', (12 << 20) + 100)
client.flush()
assert client.pread(6, 12 << 20) == b'edited'
"
[ "$(dd if="$work/disk" bs=1 skip=$((12 << 20)) count=6 status=none)" = edited ] ||
    fail "a block was filled up with what was there before"

echo "replaced by an image with other clusters"
rm "$work/disk"
convert "$work/source" "$work/disk" 2M zstd
truncate -s 16M "$work/disk"
cp "$work/disk" "$work/copy"
client "
image = open('$work/copy', 'rb').read()
assert client.pread(16 << 20, 0) == image
client.pwrite(b'e' * 1000, (14 << 20) + 1)
"
client "
assert client.pread(1002, 14 << 20) == b'\\0' + b'e' * 1000 + b'\\0'
"

echo "grown"
truncate -s $(((17 << 20) + 77)) "$work/disk"
client "
assert client.get_size() == (17 << 20) + 77
client.pwrite(b'end', (17 << 20) + 74)
"
client "
assert client.pread(4, (17 << 20) + 73) == b'\\0end'
"

echo "shrunk"
truncate -s $(((15 << 20) + 5)) "$work/disk"
client "
assert client.get_size() == (15 << 20) + 5
assert client.pread(5, 15 << 20) == bytes(5)
client.pwrite(b'e', (15 << 20) + 4)
"
stop_nbdkit server
[ "$(stat -c %s "$work/disk")" -eq $(((15 << 20) + 5)) ] || fail "the file has changed its size"
[ "$(tail -c 1 "$work/disk")" = e ] || fail "the last byte was not stored"

echo "grown while an older connection stays"
fresh_file "$work/disk" 1M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-cluster-size=64k
python "$work/server.sock" "$work/disk" <<'END'
import os, sys
from nbd_clients import connect, error_of, stored
older = connect(sys.argv[1])
older.pwrite(b"older" * 100, 5000)
os.truncate(sys.argv[2], 2 << 20)
newer = connect(sys.argv[1])
assert newer.get_size() == 2 << 20
newer.pwrite(b"newer" * 100, (1 << 20) + 5000)
newer.pwrite(b"both", 5500)
# The older connection reaches no further than the file did when it began, so
# it may have to say that it cannot store everything; the newer one can.
assert error_of(older.flush) in (None, "EIO")
newer.flush()
older.flush()
assert stored(sys.argv[2], 5000, 504) == b"older" * 100 + b"both"
assert stored(sys.argv[2], (1 << 20) + 5000, 500) == b"newer" * 100
newer.pwrite(b"last", (2 << 20) - 4)
newer.shutdown()
older.pwrite(b"later", 6000)
older.flush()
older.shutdown()
END
stop_nbdkit server
[ "$(tail -c 4 "$work/disk")" = last ] || fail "the last bytes of the grown file were not stored"
