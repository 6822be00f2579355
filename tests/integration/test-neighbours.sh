#!/usr/bin/env bash
# Exports whose storage hangs, is slow, or refuses, beside a healthy one: however
# many there are, the healthy one keeps at least half of the rate that it has
# alone, and none of its requests waits for the others' storage.

source "$(dirname "$0")/functions.sh"

make_uneven_plugin

cat >"$work/clients.py" <<'END'
"""clients.py ADDRESS ENTERED KIND COUNT: the healthy export's client, beside COUNT of KIND."""
import multiprocessing, os, signal, sys, time
import nbd, nbd_clients
from qcow2 import image_header

address, entered, kind, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
SIZE = 65536
WRITES = 2000
ROUNDS = 3
# Beyond this a round has failed, and goes on no longer. Alone it takes half a second: as long as
# storage takes for it, so that how busy the machine is matters little.
LIMIT = 20

def connect(name):
    client = nbd_clients.connect(address, name)
    client.pwrite(image_header(), 0)
    return client

def bad(name):
    """Writes, whole clusters and parts of others, until storage answers with an error."""
    try:
        client = connect(name)
        while True:
            for i in range(32, 2000):
                client.pwrite(os.urandom(256) * 256, i * SIZE)
                client.pwrite(b"part" * 1000, ((2000 + i) * SIZE + 11))
    except nbd.Error:
        # Stays connected, with what storage has refused.
        time.sleep(3600)

def round_of_writes(client):
    """Bytes a second, the longest write in seconds, and how many there were."""
    data = os.urandom(SIZE)
    worst = 0
    begin = last = time.monotonic()
    for done in range(1, WRITES + 1):
        client.pwrite(data, (15 + done) * SIZE)
        now = time.monotonic()
        worst = max(worst, now - last)
        last = now
        if now - begin > LIMIT:
            break
    client.flush()
    return done * SIZE / (time.monotonic() - begin), worst, done

def best():
    rounds = [round_of_writes(healthy)]
    while len(rounds) < ROUNDS and rounds[-1][2] == WRITES:
        rounds.append(round_of_writes(healthy))
    return max(each[0] for each in rounds), min(each[1] for each in rounds), min(each[2] for each in rounds)

signal.alarm(200) # a flush that waits for others has failed, too
healthy = connect("healthy")
alone, worst_alone, _ = best()

neighbours = [multiprocessing.Process(target=bad, args=(f"{kind}{i}",), daemon=True) for i in range(count)]
for neighbour in neighbours:
    neighbour.start()
# Each of them is known to storage.
deadline = time.monotonic() + 30
while not os.path.exists(entered):
    assert time.monotonic() < deadline, f"no write is {kind}"
    time.sleep(0.01)

beside, worst, done = best()
for neighbour in neighbours:
    neighbour.kill()
print(f"beside {count} {kind}: {beside / alone:.2f} of the rate alone ({alone / 1e6:.0f} MB/s), "
      f"longest write {worst:.3f} s ({worst_alone:.3f} s), {done} of {WRITES} writes")
sys.stdout.flush()
failed = beside < alone / 2 or worst > 0.5
if not failed:
    assert healthy.pread(112, 0) == image_header()
os._exit(1 if failed else 0)
END

# The default settings; and none of the writers that they bring.
for parameters in '' qcowcache-writers=0; do
    for neighbours in 'hung 1' 'hung 8' 'slow 2' 'slow 8' 'refusing 4'; do
        read -r kind count <<<"$neighbours"
        rm -f "$work/entered"
        # shellcheck disable=SC2086  # none or one
        start_nbdkit server --filter="$FILTER" "$uneven_plugin" "$work/entered" $parameters
        status=0
        "$PYTHON" "$work/clients.py" "$work/server.sock" "$work/entered" "$kind" "$count" || status=$?
        # Where storage hangs nothing can end well.
        kill_server server 2>/dev/null || :
        [ "$status" -eq 0 ] || fail "the healthy export pays for its neighbours${parameters:+ ($parameters)}"
    done
done
