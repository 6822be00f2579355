#!/usr/bin/env bash
# Random sequences of all requests that NBD has, over several connections, do to
# storage what they do to a plain array of bytes: every read, every extent, what
# is stored after FUA and after a flush, and the file in the end.  Most requests
# come one after the other, so that a seed repeats a run; some come in bursts on
# all connections at once, to ranges that do not overlap; and at times every
# connection has a thread of its own, and stripes of its own that share 4 KiB
# blocks with those of the others, while somebody else changes the header.
#
#   SEED=N    repeat a run (1), as far as the timing of threads allows
#   STEPS=N   steps for each kind of storage (600; with LONG=1, 20000)

source "$(dirname "$0")/functions.sh"

: "${SEED:=1}"
if [ "${LONG:-}" = 1 ]; then
    : "${STEPS:=20000}"
else
    : "${STEPS:=600}"
fi

cat >"$work/client.py" <<'END'
import gc, nbd, random, sys, threading
from nbd_clients import Client, Lane, Model, Ranges, Wrong, connect
from qcow2 import image_header

address, disk, seed, steps, connections, header, what = sys.argv[1:]
dice = random.Random(f"{seed} {header} {connections} {what}")
shares = int(connections) > 1
first = connect(address)
size = first.get_size()
model = Model(bytearray(first.pread(size, 0)))
ranges = Ranges(dice, size)


def new_client(number, connection=None):
    return Client(connection or connect(address), model, random.Random(dice.getrandbits(64)),
                  f"connection {number}", disk)


clients = [new_client(0, first)] + [new_client(number) for number in range(1, int(connections))]


def burst():
    chosen = []
    for _ in range(dice.randrange(2, 9)):
        begin, end = ranges.some()
        if all(end <= other[0] or other[1] <= begin for other in chosen):
            chosen.append((begin, end))
    for request in [dice.choice(clients).begin(*each) for each in chosen]:
        request.finish()


def reconnect():
    number = dice.randrange(len(clients))
    model.recent.append(f"reconnect {number}")
    if not shares:
        clients[number].nbd.flush()
    if dice.random() < 0.5:
        clients[number].nbd.shutdown()
    else:
        # Without goodbye.
        clients[number] = None
        gc.collect()
    clients[number] = new_client(number)


def write_header(connection):
    """A header, or none, maybe in pieces."""
    if header == "none" or dice.random() < 0.2:
        data = bytes(112)
    else:
        data = image_header(int(header) if dice.random() < 0.6 else dice.choice([9, 12, 16, 17, 21]))
    cut = dice.choice([112, 112, dice.randrange(1, 112)])
    model.recent.append(f"header {data[23]}, cut at {cut}")
    for begin, end in ((0, cut), (cut, 112)):
        if begin < end:
            connection.pwrite(data[begin:end], begin, dice.choice([0, 0, nbd.CMD_FLAG_FUA]))
    model.is_(0, data)


def threads():
    """Everybody at once, each in bytes of its own between those of the others."""
    stripe = dice.choice([1, 37, 511, 700, 1024, 3000, 20000])
    model.recent.append(f"all at once, in stripes of {stripe}")
    failures = []

    def work(number):
        client = clients[number]
        own = Lane(number, len(clients), stripe, size)
        touched = []
        try:
            for _ in range(60):
                if client.dice.random() < 0.06:
                    client.flush(*touched)
                    continue
                if not touched or client.dice.random() < 0.7:
                    touched.append(own.some_range(client.dice))
                client.request(*client.dice.choice(touched))
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(clients))]
    for worker in workers:
        worker.start()
    if header != "none" and shares and dice.random() < 0.3:
        for _ in range(5):
            extra = connect(address)
            write_header(extra)
            extra.shutdown()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def step():
    kind = dice.random()
    if kind < 0.7:
        dice.choice(clients).request(*ranges.some())
    elif kind < 0.845:
        burst()
    elif kind < 0.915:
        dice.choice(clients).flush((0, size))
    elif kind < 0.955:
        reconnect()
    elif kind < 0.97:
        write_header(dice.choice(clients).nbd)
    elif kind < 0.985:
        threads()
    else:
        dice.choice(clients).same(0, size, "read of everything")


try:
    if header != "none":
        first.pwrite(image_header(int(header)), 0)
        model.is_(0, image_header(int(header)))
    del first
    for _ in range(int(steps)):
        step()
    for client in clients:
        client.same(0, size, "read at the end")
    if what == "slow storage":
        # nbdkit's delay filter refuses whatever comes once the server has been told to end.
        clients[0].flush((0, size))
except Wrong as wrong:
    sys.exit(wrong)
with open(disk + ".expected", "wb") as expected:
    expected.write(model.held)
END

# check WHAT SIZE CONNECTIONS HEADER NBDKIT-ARGUMENT...
check ()
{
    local what=$1 size=$2 connections=$3 header=$4
    shift 4
    echo "$what"
    fresh_file "$work/disk" "$size"
    start_nbdkit server --filter="$FILTER" "$@"
    "$PYTHON" "$work/client.py" "$work/server.sock" "$work/disk" "$SEED" "$STEPS" "$connections" \
        "$header" "$what" || fail "$what: SEED=$SEED STEPS=$STEPS repeats it"
    # Mostly nobody has flushed: what the connections left has to be stored all the same.
    stop_nbdkit server
    cmp "$work/disk" "$work/disk.expected" || fail "$what: other bytes are stored; SEED=$SEED STEPS=$STEPS repeats it"
}

disk=$work/disk
check "no header" 1048699 3 none file "$disk"
check "64K clusters" 1048699 4 16 file "$disk"
check "64K clusters, no background writers" 1048699 3 16 file "$disk" qcowcache-writers=0
check "little memory" 2097275 4 16 file "$disk" qcowcache-size=256K
check "one writer, little memory" 1048699 4 16 file "$disk" \
    qcowcache-writers=1 qcowcache-size=256K
check "no background writers, little memory" 1048699 3 12 file "$disk" \
    qcowcache-writers=0 qcowcache-size=200K
check "one thread a connection" 1048699 4 16 file "$disk" -t 1 qcowcache-size=256K
check "2M clusters, little memory" 4194427 4 21 file "$disk" qcowcache-size=4M
check "16 writers, 2M clusters" 4194427 4 21 file "$disk" qcowcache-writers=16 qcowcache-size=8M
check "no memory" 524411 3 16 file "$disk" qcowcache-size=0
check "a fixed cluster size" 524411 4 none file "$disk" qcowcache-cluster-size=64K
check "slow storage" 524411 4 16 --filter=delay file "$disk" wdelay=1ms rdelay=1ms qcowcache-size=256K
check "blocks of 512, at most 16K" 524288 3 16 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=512 blocksize-maximum=16K blocksize-error-policy=error qcowcache-writers=0
check "blocks of 4096" 1048576 4 16 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=4096 blocksize-error-policy=error
check "blocks of 4096, no header" 1048576 4 none --filter=blocksize-policy file "$disk" \
    blocksize-minimum=4096 blocksize-error-policy=error
check "blocks of 64K" 1048576 3 12 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=64K blocksize-preferred=64K blocksize-error-policy=error \
    qcowcache-size=256K qcowcache-writers=1
check "no zero, no extents, no cache" 1048699 3 16 --filter=nozero --filter=noextents \
    --filter=nocache file "$disk" cachemode=none
check "zero as writes" 524411 3 16 --filter=nozero file "$disk" zeromode=emulate
check "no fast zero" 524411 3 16 --filter=nozero file "$disk" fastzeromode=none
check "FUA as flush" 524411 4 16 --filter=fua file "$disk" fuamode=emulate
check "no FUA" 524411 3 16 --filter=fua file "$disk" qcowcache-writers=0
check "requests one at a time" 1048699 4 16 --filter=noparallel file "$disk" serialize=requests
check "requests of all one at a time" 524411 4 16 --filter=noparallel file "$disk" serialize=all-requests
check "a cache for each connection" 524411 1 16 --filter=multi-conn file "$disk" \
    multi-conn-mode=disable
