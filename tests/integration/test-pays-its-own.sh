#!/usr/bin/env bash
# Without background writers requests write to storage themselves: each what it
# has itself made ready, and not what others go on making ready meanwhile.

source "$(dirname "$0")/functions.sh"

make_uneven_plugin
mkfifo "$work/entered"
start_nbdkit server --filter="$FILTER" "$uneven_plugin" "$work/entered" qcowcache-writers=0 qcowcache-expire=0
python "$work/server.sock" "$work/entered" <<'END'
import nbd, os, random, sys
from nbd_clients import connect, image_header

UNIT = 65536
MOST = 40

# Storage says here that a write begins.
entered = os.open(sys.argv[2], os.O_RDWR | os.O_NONBLOCK)

def writes_begun():
    try:
        return len(os.read(entered, 4096))
    except BlockingIOError:
        return 0

random.seed(1)
expected = {}

def unit(i):
    expected[i] = random.randbytes(UNIT)
    return expected[i]

one, other = connect(sys.argv[1], "slow"), connect(sys.argv[1], "slow")
one.pwrite(image_header(), 0)
one.flush()
writes_begun()

# Fifteen clusters that wait, and one that a hundred bytes complete: enough for a large write.
for i in range(100, 115):
    other.pwrite(unit(i), i * UNIT)
other.pwrite(unit(115)[:-100], 115 * UNIT)
assert writes_begun() == 0, "nothing was to be written yet"

# Each time storage begins a write, the other client makes two more clusters ready.
request = one.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(expected[115][-100:])), 116 * UNIT - 100)
begun = 0
next_unit = 200
while not one.aio_command_completed(request):
    one.poll(1)
    for _ in range(writes_begun()):
        begun += 1
        if begun < MOST:
            for _ in range(2):
                other.pwrite(unit(next_unit), next_unit * UNIT)
                next_unit += 1
print(f"{begun} writes to storage during a write of 100 bytes")
assert 1 <= begun <= 8, f"a write of 100 bytes waited for {begun} writes to storage"

one.flush()
for i, data in expected.items():
    assert other.pread(UNIT, i * UNIT) == data
END
stop_nbdkit server
