#!/usr/bin/env bash
# The system has less memory for nbdkit than qcowcache-size allows: what cannot be
# held goes to storage.  No client hears of it, and nothing is lost.

source "$(dirname "$0")/functions.sh"

requires_program prlimit

fresh_image "$work/disk" 256M 21
# The C library would take address space for each thread in advance.
export MALLOC_ARENA_MAX=1
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-size=1G
server=${server_pid[server]}
nbdsh -u "$(uri server)" -c "
import random, resource
random.seed(1)
PIECE = 60000
# Threads, and what they allocate once, are there before the limit is.
piece = nbd.Buffer.from_bytearray(bytearray(PIECE))
for _ in range(200):
    h.aio_pwrite(piece, 1 << 20)
while h.aio_in_flight() > 0:
    h.poll(-1)
h.flush()

with open('/proc/$server/statm') as statm:
    size = int(statm.read().split()[0]) * resource.getpagesize()
resource.prlimit($server, resource.RLIMIT_AS, (size + (12 << 20), size + (12 << 20)))

data = random.randbytes(128 << 20)
# A piece of each unit, then the next of each, so that all are wanted at once.
for piece in range(0, 2 << 20, PIECE):
    for unit in range(0, len(data), 2 << 20):
        begin, end = unit + piece, unit + min(piece + PIECE, 2 << 20)
        h.pwrite(data[begin:end], (2 << 20) + begin)
assert h.pread(1 << 20, (2 << 20) + (64 << 20)) == data[64 << 20:65 << 20]
h.flush()
with open('$work/data', 'wb') as file:
    file.write(data)
"
[ ! -s "$work/server.err" ] || fail "somebody was told: $(cat "$work/server.err")"
stop_nbdkit server
cmp "$work/data" <(tail -c +$(((2 << 20) + 1)) "$work/disk" | head -c $((128 << 20)))
