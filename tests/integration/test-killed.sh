#!/usr/bin/env bash
# nbdkit is killed at random moments, again and again on the same file: each
# byte of which a flush or FUA was acknowledged is in the file, and is read
# through the next server; what came later is there or is not; nothing else is.
# An image that qemu-img was filling is without corruption.
#
#   SEED=N   choose the same requests again (each run prints its seed)
#   LONG=1   twenty times as many kills

source "$(dirname "$0")/functions.sh"

: "${SEED:=$RANDOM}"
echo "seed $SEED"
kills=50 conversions=8
if [ "${LONG:-}" = 1 ]; then kills=1000 conversions=160; fi

cat >"$work/client.py" <<'END'
import nbd, os, random, signal, sys
from nbd_clients import Model, Wrong, connect, send, stored

address, disk, server, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random.seed(seed)
IN_FLIGHT = 16

clients = [connect(address) for _ in range(2)]
size = clients[0].get_size()
model = Model(bytearray(stored(disk)))
busy = {}           # what has not been answered: by number, with the range that it changes
acknowledged = []   # changes that no acknowledged flush covers
counts = {"requests": 0, "flushes": 0}

def begin(client, kind, first, end, data, then, flags=0):
    counts["requests"] += 1
    number = counts["requests"]
    def answered(error):
        del busy[number]
        if error == 0:
            then()
    # What it sends stays there until it has been answered, which may be at once.
    busy[number] = [first, end]
    kept = busy[number]
    kept.append(send(client, kind, first, end, data, answered, flags))

def flush(client):
    covered = list(acknowledged)
    def then():
        counts["flushes"] += 1
        for change in covered:
            model.has_come(change)
    begin(client, "flush", 0, 0, None, then)

def write(client, offset, length):
    # Of two requests at once in the same bytes either may win.
    end = offset + length
    if any(offset < other_end and other < end for other, other_end, *_ in busy.values()):
        return
    kind = "zero" if random.random() < 0.1 else "write"
    fua = random.random() < 0.05
    data = bytes(length) if kind == "zero" else random.randbytes(length)
    change = model.may_be(offset, data)
    model.recent.append(f"{kind} {offset}-{end}{', durable' if fua else ''}")
    begin(client, kind, offset, end, data,
          lambda: model.has_come(change) if fua else acknowledged.append(change), nbd.CMD_FLAG_FUA if fua else 0)

def wait_until_below(most):
    while len(busy) > most:
        for client in clients:
            client.poll(0 if client is not clients[-1] else 1)

# An image's writer: data is appended, tables are written again and again.
def requests():
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

try:
    for offset in range(0, size, 1 << 20):
        found = clients[1].pread(min(1 << 20, size - offset), offset)
        model.same(found, offset, "the new server does not read what is stored")
    requests()
    os.kill(server, signal.SIGKILL)
    # What it had answered before it died may still be on the way.
    for client in clients:
        try:
            while client.aio_in_flight() and not client.aio_is_dead() and not client.aio_is_closed():
                client.poll(-1)
        except nbd.Error:
            pass
    model.same(stored(disk, 0, size), 0, "stored when it was killed, and neither as flushed nor as written later")
except Wrong as wrong:
    sys.exit(wrong)
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

fresh_image "$work/disk" 8389119 16
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
