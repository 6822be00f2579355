#!/usr/bin/env bash
# Storage that cannot be read for a moment, just when the filter looks for the
# qcow2 header: the next request looks again, and what follows is cached.  Where it
# cannot be read for long, no client waits for one failure after the other; the
# first who can read the header ends that.

source "$(dirname "$0")/functions.sh"

start ()
{
    fresh_image "$work/disk" 8M 16
    start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" \
        error-pread=EIO error-pread-rate=100% error-pread-file="$work/unreadable" \
        qcowcache-expire=0 qcowcache-stats="$work/stats.json"
}
# client PYTHON: who is connected as h
client () { nbdsh -u "$(uri server)" -c "import os" -c "$1"; }
# How many writes storage got.
writes () { jq .total.storage_writes "$work/stats.json"; }
failures () { grep -c 'injecting EIO error into pread' "$work/server.err"; }

# For the first of 64 writes.
: >"$work/unreadable"
start
client "
for i in range(64):
    h.pwrite(bytes([i + 1]) * 1024, 65536 + i * 1024)
    if i == 0:
        os.remove('$work/unreadable')
h.flush()
"
stop_nbdkit server
[ "$(writes)" -eq 2 ] || fail "64 small writes to one cluster became $(writes)"

# For long: each write goes through, and no more than three have looked first.
: >"$work/unreadable"
start
client "
for i in range(32):
    h.pwrite(bytes([i + 1]) * 4096, 65536 + i * 4096)
os.remove('$work/unreadable')
h.pread(512, 0)
for i in range(32):
    h.pwrite(bytes([i + 1]) * 1024, 1048576 + i * 1024)
h.flush()
"
stop_nbdkit server
[ "$(failures)" -eq 3 ] || fail "the header was looked for $(failures) times"
[ "$(writes)" -eq 33 ] || fail "$(writes) writes, where 32 went through and 32 were cached"
