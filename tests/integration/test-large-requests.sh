#!/usr/bin/env bash
# Requests as large as NBD clients send them, 64 MiB, and single bytes between
# them: at odd offsets, up to the last byte of an odd export, through a cache
# that is larger than such a request, through one that is much smaller, and
# through none.

source "$(dirname "$0")/functions.sh"

# large_requests WHAT NBDKIT-ARGUMENT...
large_requests ()
{
    echo "$1"
    shift
    fresh_file "$work/disk" 140000513
    start_nbdkit server --filter="$FILTER" "$@"
    python "$work/server.sock" "$work/disk" <<'END'
import nbd, sys
from nbd_clients import Model, connect, error_of, stored

LARGE = 64 << 20
client = connect(sys.argv[1], strict=False)
size = client.get_size()
end = size - LARGE
model = Model(bytearray(size))
block = bytes(i * 7 % 251 + 1 for i in range(65521))
data = (block * (LARGE // len(block) + 1))[:LARGE]

def write(what, offset, flags=0):
    client.pwrite(what, offset, flags)
    model.is_(offset, what)

def same(offset, length):
    model.same(client.pread(length, offset), offset, "read")

write(b"a", 0)
write(b"z", size - 1)
write(data, 1)
write(b"b", 65536)
same(1, LARGE)
write(data, end)
write(b"c", size - 1)
same(end, LARGE)
same(size - 1, 1)
write(data, 511, nbd.CMD_FLAG_FUA)
write(b"d", 512)
client.zero(LARGE, end - 3)
model.is_(end - 3, bytes(LARGE))
write(b"e", end + 4097)
same(end - 4, LARGE)
same(0, LARGE)
assert error_of(lambda: client.pwrite(data, end + 1)), "a write behind the end succeeded"
client.flush()
model.same(stored(sys.argv[2], 0, size), 0, "stored after a flush")
client.shutdown()
END
    stop_nbdkit server
}

large_requests "a large cache" file "$work/disk" qcowcache-cluster-size=64K qcowcache-size=192M
large_requests "a small cache" file "$work/disk" qcowcache-cluster-size=64K qcowcache-size=1M
large_requests "a small cache, large clusters, no writers" file "$work/disk" qcowcache-cluster-size=2M \
    qcowcache-size=9M qcowcache-writers=0
large_requests "no cache" file "$work/disk"
