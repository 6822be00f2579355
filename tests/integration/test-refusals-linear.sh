#!/usr/bin/env bash
# Storage that refuses everything, and a cache full of scattered small pieces:
# what a flush in vain, and the end of a client, cost grows with how much there
# is, and no faster; and nobody who reads what is cached waits for it.

source "$(dirname "$0")/functions.sh"

cat >"$work/clients.py" <<'END'
"""clients.py ADDRESS PID ERROR FULL MIB FLUSHES: fills units of so much memory, flushes, and leaves.

Prints what that cost: processor seconds of the first flush, of FLUSHES more, and of a client's
leaving; and the longest that somebody waited for a read from memory during such a flush, and
while a client left.
"""
import os, sys, threading, time
from nbd_clients import connect, error_of

address, server, error, full = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
mebibytes, flushes = int(sys.argv[5]), int(sys.argv[6])
UNIT = 65536

def processor(work):
    """Seconds that the server uses for it."""
    def used():
        with open(f"/proc/{server}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    before = used()
    work()
    return used() - before

units = mebibytes * 16
while units % 7919 == 0:
    units -= 1

def position(i):
    # Every second unit, in an order that is neither that of the disk nor its opposite.
    return (1 << 20) + (i * 7919 % units) * 2 * UNIT + 4096 + i % 1000

def refused(client):
    assert error_of(client.flush) == error, "a flush succeeds that stores nothing"

def longest_read(work):
    """The longest that a read of cached bytes waits while this is done."""
    done = threading.Event()
    waited = [0]

    def read():
        while not done.is_set():
            begin = time.monotonic()
            assert reader.pread(5, position(0)) == b"piece"
            waited[0] = max(waited[0], time.monotonic() - begin)

    thread = threading.Thread(target=read)
    thread.start()
    work()
    done.set()
    thread.join()
    return waited[0]

reader, *clients = [connect(address) for _ in range(3)]
for client in clients:
    client.pwrite(b"read", 100)
for i in range(units):
    clients[i % 2].pwrite(b"piece", position(i))
open(full, "w").close()
first = processor(lambda: refused(clients[0]))
again = processor(lambda: [refused(clients[0]) for _ in range(flushes)])
# The least of three, for the machine may be busy with other things.
read_beside_flush = min(longest_read(lambda: refused(clients[0])) for _ in range(3))
for i in range(0, units, 97):
    assert reader.pread(5, position(i)) == b"piece"
read_beside_leaving = longest_read(clients[0].shutdown)
leaving = processor(clients[1].shutdown)
print(first, again, leaving, read_beside_flush, read_beside_leaving)
sys.stdout.flush()
os._exit(0)
END

# measure ERROR MIB FLUSHES: what clients.py prints, in variables of these names.
# There is so much memory that no piece has to be written before storage refuses.
measure ()
{
    rm -f "$work/full"
    fresh_file "$work/disk" $(($2 * 2 + 2))M
    start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" \
        error-pwrite="$1" error-pwrite-rate=100% error-pwrite-file="$work/full" \
        qcowcache-size="$(($2 * 5 / 2))M" qcowcache-cluster-size=64K qcowcache-expire=0
    timeout 600 "$PYTHON" "$work/clients.py" "$work/server.sock" "${server_pid[server]}" \
        "$1" "$work/full" "$2" "$3" >"$work/figures" || fail "$*: see above"
    read -r first again leaving read_beside_flush read_beside_leaving <"$work/figures"
    # What is left to lose is no matter here.
    kill_server server >/dev/null 2>&1 || :
    echo "$1, $2 MiB: processor seconds: first flush $first, $3 more $again, a client leaves $leaving;" \
        "longest read: $read_beside_flush s beside a flush, $read_beside_leaving s beside a client that leaves"
}

# Both are numbers with a point.
at_most () { awk "BEGIN { exit !($1 <= $2) }"; }

for error in ENOSPC EIO; do
    measure "$error" 64 8
    small_first=$first
    small_again=$again
    small_leaving=$leaving
    measure "$error" 512 1
    # With eight times as many units, what grows with their square takes 64 times as long.
    at_most "$first" "$small_first * 16 + 0.5" || fail "$error: the first flush: not linear"
    at_most "$again" "$small_again * 2 + 0.5" || fail "$error: a later flush: not linear"
    at_most "$leaving" "$small_leaving * 16 + 0.5" || fail "$error: a client leaves: not linear"
    at_most "$read_beside_flush" 0.5 || fail "$error: a read waits for a flush"
    at_most "$read_beside_leaving" 0.5 || fail "$error: a read waits for a client that leaves"
done

if [ "${LONG:-}" = 1 ]; then
    for error in ENOSPC EIO; do
        measure "$error" 4096 1
        for cost in "$first" "$again" "$leaving"; do
            at_most "$cost" 2 || fail "$error: 4 GiB cost $cost s"
        done
        at_most "$read_beside_flush" 0.05 || fail "$error: a read waits for a flush"
        at_most "$read_beside_leaving" 0.05 || fail "$error: a read waits for a client that leaves"
    done
fi
