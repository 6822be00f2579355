#!/usr/bin/env bash
# What a flush or FUA acknowledges is on storage, and storage has been flushed,
# when the acknowledgement arrives: seen in the file behind nbdkit's back.

source "$(dirname "$0")/functions.sh"

for mode in native none emulate; do
    echo "storage with FUA: $mode"
    below=()
    case $mode in
        none) below=(--filter=fua) ;;
        emulate) below=(--filter=fua fuamode=emulate) ;;
    esac
    fresh_image "$work/disk" 8388731 16
    # Background writers would mix requests of their own into the log.
    start_nbdkit server --filter="$FILTER" --filter=log "${below[@]:0:1}" file "$work/disk" \
        "${below[@]:1}" logfile="$work/below.log" qcowcache-writers=0
    run_client server "$work/disk" "$work/below.log" <<'END'
import re
disk, log = arguments
random.seed(11)
clients = client, connect(address)
size = client.get_size()

log = open(log)
def requests_since():
    return [line for line in log.read().splitlines() if line.endswith("...")]

def assert_made_durable(requests, what):
    changes = [i for i, line in enumerate(requests) if re.search(" (Write|Zero|Trim) ", line)]
    flushes = [i for i, line in enumerate(requests) if " Flush " in line]
    if changes and not (flushes and flushes[-1] > changes[-1]):
        for i in changes:
            assert "fua=1" in requests[i] or any(flush > i for flush in flushes), \
                f"{what}: neither flushed nor with FUA: {requests[i]}"

cached = {}
# Those through whose connection storage was not flushed since something was changed.
to_flush = set(clients)
for step in range(150):
    client = random.choice(clients)
    length = random.choice([1, 700, 4096, 30000, 65536, 150000])
    offset = random.choice([random.randrange(4096, size - length), size - length])
    data = random.randbytes(length)
    kind = random.choice(["cached", "cached", "cached", "fua", "zero", "flush", "flush"])
    if kind != "flush":
        to_flush.update(clients)
    if kind == "cached":
        requests_since()
        client.pwrite(data, offset)
        cached[offset] = data
        for other in list(cached):
            if other != offset and other < offset + length and offset < other + len(cached[other]):
                del cached[other]
    elif kind == "flush":
        requests_since()
        client.flush()
        flushed = any(" Flush " in line for line in requests_since())
        assert flushed == (client in to_flush), f"storage was flushed: {flushed}"
        to_flush.discard(client)
        for at, expected in cached.items():
            assert stored(disk, at, len(expected)) == expected, f"not stored when flushed: {at}"
        cached.clear()
    else:
        requests_since()
        if kind == "fua":
            client.pwrite(data, offset, nbd.CMD_FLAG_FUA)
        else:
            data = bytes(length)
            client.zero(length, offset, nbd.CMD_FLAG_FUA)
        assert stored(disk, offset, length) == data, f"{kind}: not stored when acknowledged: {offset}+{length}"
        requests = requests_since()
        assert_made_durable(requests, kind)
        for other in list(cached):
            if other < offset + length and offset < other + len(cached[other]):
                del cached[other]
END
    stop_nbdkit server
done

echo "SIGTERM with bytes in memory"
fresh_file "$work/disk" 4M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-cluster-size=64K
mkfifo "$work/written"
"$PYTHON" - "$work/server.sock" "$work/written" <<'END' &
import sys
from nbd_clients import connect
client = connect(sys.argv[1])
for i in range(30):
    client.pwrite(bytes([i + 1]) * 3001, 100003 * i + 7)
open(sys.argv[2], "w").write("all\n")
while True:
    client.poll(-1)
END
client=$!
read -r _ <"$work/written"
# nbdkit itself waits for its clients to go; only then, told to end already,
# does it let go of the connection.
kill -TERM "${server_pid[server]}"
kill -KILL "$client"
end_of_nbdkit server
python "$work/disk" <<'END'
import sys
from nbd_clients import stored
for i in range(30):
    assert stored(sys.argv[1], 100003 * i + 7, 3001) == bytes([i + 1]) * 3001, f"write {i} is lost"
END
