#!/usr/bin/env bash
# nbdkit is killed at random moments, again and again on the same file: each
# byte of which a flush or FUA was acknowledged is in the file, and is read
# through the next server; what came later is there or is not; nothing else is.
# An image that qemu-img was filling is without corruption.
#
#   SEED=N   choose the same requests again (each run prints its seed)
#   LONG=1   twenty times as many kills

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

: "${SEED:=$RANDOM}"
echo "seed $SEED"
kills=50 conversions=8
if [ "${LONG:-}" = 1 ]; then kills=1000 conversions=160; fi

cat >"$work/client.py" <<'END'
import nbd, os, random, signal, sys

address, disk, server, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random.seed(seed)
IN_FLIGHT = 16
CHUNK = 512

def stored():
    with open(disk, "rb") as file:
        return file.read()

class Request:
    """A write or zero: `data` is what its bytes become."""

    def __init__(self, offset, data):
        self.offset, self.data, self.end = offset, data, offset + len(data)
        self.acknowledged = False
        self.open = [(offset, self.end)]    # where no later request is settled

    def part(self, begin, end):
        return self.data[begin - self.offset:end - self.offset]

    def close(self, begin, end):
        parts = [part for b, e in self.open for part in ((b, min(e, begin)), (max(b, end), e))]
        self.open = [(b, e) for b, e in parts if b < e]

clients = []
for _ in range(2):
    client = nbd.NBD()
    client.connect_unix(address)
    clients.append(client)
size = clients[0].get_size()

settled = bytearray(stored())
for offset in range(0, size, 1 << 20):
    length = min(1 << 20, size - offset)
    if clients[1].pread(length, offset) != settled[offset:offset + length]:
        sys.exit(f"the new server does not read what is stored at {offset}+{length}")
later = []          # requests that no acknowledged flush covers, in their order
busy = set()        # those that have not been answered
counts = {"requests": 0, "flushes": 0}

def settle(covered):
    """What these requests wrote, in their order, replaces what was there before."""
    for request in covered:
        if request in later:
            for begin, end in request.open:
                settled[begin:end] = request.part(begin, end)
            for older in later[:later.index(request)]:
                older.close(request.offset, request.end)
            later.remove(request)

def answered(request, then=None):
    def completion(error):
        busy.discard(request)
        if error.value == 0:
            if isinstance(request, Request):
                request.acknowledged = True
            if then:
                then()
        return 1
    busy.add(request)
    counts["requests"] += 1
    return completion

def flush(client):
    covered = [request for request in later if request.acknowledged]
    def then():
        counts["flushes"] += 1
        settle(covered)
    client.aio_flush(completion=answered(object(), then))

def overlaps_busy(offset, end):
    return any(isinstance(other, Request) and other.offset < end and offset < other.end for other in busy)

def write(client, offset, length):
    # Of two requests at once in the same bytes either may win.
    if overlaps_busy(offset, offset + length):
        return
    zero = random.random() < 0.1
    fua = random.random() < 0.05
    request = Request(offset, bytes(length) if zero else random.randbytes(length))
    later.append(request)
    flags = nbd.CMD_FLAG_FUA if fua else 0
    then = (lambda: settle([request])) if fua else None
    if zero:
        client.aio_zero(length, offset, completion=answered(request, then), flags=flags)
    else:
        request.buffer = nbd.Buffer.from_bytearray(bytearray(request.data))
        client.aio_pwrite(request.buffer, offset, completion=answered(request, then), flags=flags)

def wait_until_below(most):
    while len(busy) > most:
        for client in clients:
            client.poll(0 if client is not clients[-1] else 1)

# An image's writer: data is appended, tables are written again and again.
cursor = 65536 + random.randrange(size // 2)
table = random.randrange(1, size // 65536 - 1) * 65536
for _ in range(random.randrange(20, 500)):
    client = random.choice(clients)
    kind = random.random()
    if kind < 0.6:
        length = random.choice([1, 700, 4096, 9000, 27000, 65536, 80000])
        if cursor + length > size:
            cursor = 65536
        write(client, cursor, length)
        cursor += length
    elif kind < 0.8:
        write(client, table + random.randrange(0, 65536, 8), 8)
    elif kind < 0.9:
        write(client, table + random.randrange(0, 65536, 4096), 4096)
    else:
        flush(client)
    wait_until_below(IN_FLIGHT)

os.kill(server, signal.SIGKILL)
# What it had answered before it died may still be on the way.
for client in clients:
    try:
        while client.aio_in_flight() and not client.aio_is_dead() and not client.aio_is_closed():
            client.poll(-1)
    except nbd.Error:
        pass

found = stored()
newest = bytearray(settled)
for request in later:
    for begin, end in request.open:
        newest[begin:end] = request.part(begin, end)
for begin in range(0, size, CHUNK):
    end = min(begin + CHUNK, size)
    if found[begin:end] not in (settled[begin:end], newest[begin:end]):
        near = [request for request in later if request.offset < end and begin < request.end]
        for i in range(begin, end):
            values = [request.data[i - request.offset] for request in near
                      if any(b <= i < e for b, e in request.open)]
            if found[i] != settled[i] and found[i] not in values:
                sys.exit(f"the byte at {i} is {found[i]}: it was flushed as {settled[i]}, and later {values} came")
print(counts["requests"], counts["flushes"])
END

# start_victim NAME ARGUMENT...: start_nbdkit for a server that will be killed,
# of which the shell shall make no fuss.
start_victim ()
{
    start_nbdkit "$@"
    disown "${server_pid[$1]}"
}

# bury SERVER: see to it that a server that was killed has ended, and forget it.
bury ()
{
    wait_until 30 server_has_ended "$1" || fail "nbdkit survives SIGKILL"
    unset "server_pid[$1]"
}

round=0

# killed_while_writing ROUNDS PARAMETER...
killed_while_writing ()
{
    local rounds=$1 i
    shift
    for ((i = 0; i < rounds; i++)); do
        start_victim server --filter="$FILTER" file "$work/disk" "$@"
        round=$((round + 1))
        "$PYTHON" "$work/client.py" "$work/server.sock" "$work/disk" "${server_pid[server]}" \
            $((SEED * 1000 + round)) >>"$work/counts" ||
            fail "round $round, parameters: $*: SEED=$SEED repeats its requests"
        bury server
    done
    echo "killed $rounds times: ${*:-no parameters}"
}

fresh_file "$work/disk" 8389119
write_header "$work/disk" 16
killed_while_writing $((kills * 2 / 5))
killed_while_writing $((kills / 5)) qcowcache-size=320K
killed_while_writing $((kills / 5)) qcowcache-writers=0 qcowcache-expire=0
killed_while_writing $((kills / 5)) qcowcache-cluster-size=512 qcowcache-max-write=64K
awk '{ requests += $1; flushes += $2 }
     END { print requests " requests, " flushes " flushes acknowledged"; exit !(flushes > NR) }' \
    "$work/counts" || fail "hardly any flush was acknowledged before the kill"

# has_lines FILE N
has_lines () { [ "$(wc -l <"$1")" -ge "$2" ]; }
converted_or_has_lines () { has_lines "$@" || ! kill -0 "$client" 2>/dev/null; }

make_tar_image "$work/source" 10M
RANDOM=$((SEED % 32768))
unfinished=0
for ((i = 0; i < conversions; i++)); do
    order=()
    if ((i % 2)); then order=(-W -m 16); fi
    rm -f "$work/image" "$work/above.log"
    qemu-img create -q -f qcow2 -o cluster_size=4k "$work/image" 10M
    truncate -s 24M "$work/image"
    start_victim server --filter=log --filter="$FILTER" file "$work/image" logfile="$work/above.log"
    qemu-img convert -n -c -t none "${order[@]}" -f raw -O qcow2 "$work/source" "$(uri server)" \
        >"$work/convert.log" 2>&1 &
    client=$!
    wait_until 60 converted_or_has_lines "$work/above.log" $((500 + RANDOM % 3500)) ||
        fail "qemu-img hangs"
    kill -KILL "${server_pid[server]}"
    wait "$client" || unfinished=$((unfinished + 1))
    bury server
    status=0
    qemu-img check -f qcow2 "$work/image" >"$work/check.log" 2>&1 || status=$?
    if [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; then
        tail -n 20 "$work/check.log" >&2
        fail "killed while an image was filled: it is corrupt (qemu-img check: $status)"
    fi
done
echo "killed $conversions conversions, $unfinished of them before their end: no corruption"
[ "$unfinished" -gt 0 ] || fail "every conversion had ended before the kill"
