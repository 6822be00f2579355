#!/usr/bin/env bash
# A client stops to listen with its writes under way while memory is full, as one
# does whose network is gone.  Somebody connects in its place and writes something
# newer to the same bytes: what was still on its way never replaces it.

source "$(dirname "$0")/functions.sh"

rounds=25
if [ "${LONG:-}" = 1 ]; then
    rounds=300
fi

fresh_image "$work/disk" 32M 16
# The log filter says what has arrived.
start_nbdkit server --filter=log --filter="$FILTER" --filter=delay file "$work/disk" \
    logfile="$work/arrived.log" wdelay=20ms qcowcache-size=1M
python "$work/server.sock" "$rounds" "$work/arrived.log" <<'END'
import nbd, os, random, signal, sys, time
from nbd_clients import connect
address, rounds, log = sys.argv[1], int(sys.argv[2]), open(sys.argv[3])
random.seed(17)

def all_arrive(todo):
    """Waits until all of these are in the server: what is still in a socket may come at any time."""
    missing = [f" offset={offset:#x} count={size:#x} " for offset, size in todo]
    while missing:
        line = log.readline()
        missing = [each for each in missing if not (" Write id=" in line and each in line)]
        if not line:
            time.sleep(0.001)

def places():
    # No more than the server takes at once; some at odd places, some whole blocks.
    units = random.sample(range(16, 400), 12)
    return [((unit << 16) + random.randrange(0, 32768) // grid * grid, size)
            for unit, (grid, size) in zip(units, [(1, 700), (4096, 4096)] * 6)]

class Silent:
    """A client with writes under way that nobody hears of any more."""
    def __init__(self, todo):
        sent, self.sent = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            client = connect(address)
            for offset, size in todo:
                client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"o" * size)), offset)
            os.write(self.sent, b".")
            signal.pause()
        os.read(sent, 1)
        os.close(sent)
        all_arrive(todo)
        time.sleep(random.uniform(0.01, 0.05))

    def end(self):
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        os.close(self.sent)

filler = connect(address)
reverted = torn = written = 0
for round in range(rounds):
    for unit in range(400, 500):  # memory is full of others'
        filler.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"f" * 100)), unit << 16)
    todo = places()
    silent = Silent(todo)
    client = connect(address)
    for offset, size in todo:
        client.pwrite(b"n" * size, offset)
    client.flush()
    while filler.aio_in_flight() > 0:
        filler.poll(-1)
    for offset, size in todo:
        found = bytes(client.pread(size, offset))
        written += 1
        reverted += found == b"o" * size
        torn += found not in (b"o" * size, b"n" * size)
    client.shutdown()
    silent.end()
print(f"of {written} writes {reverted} were reverted, {torn} torn")
sys.exit(1 if reverted + torn else 0)
END
stop_nbdkit server
