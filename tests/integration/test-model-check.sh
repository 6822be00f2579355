#!/usr/bin/env bash
# Random sequences of all requests that NBD has, over several connections, do
# to storage what they do to a plain array of bytes: every read, every extent,
# what is stored after FUA and after a flush, and the file in the end.  Most
# requests come one after the other, so that a seed repeats a run; some come in
# bursts on all connections at once, to ranges that do not overlap.
#
#   SEED=N    repeat a run (1)
#   STEPS=N   steps for each kind of storage (600; with LONG=1, 20000)

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

: "${SEED:=1}"
if [ "${LONG:-}" = 1 ]; then
    : "${STEPS:=20000}"
else
    : "${STEPS:=600}"
fi

cat >"$work/client.py" <<'END'
import errno, gc, nbd, random, struct, sys

address, disk, seed, steps, connections, header = sys.argv[1:7]
random.seed(f"{seed} {header} {connections} {sys.argv[7]}")
shares = int(connections) > 1
recent = []


def connect():
    client = nbd.NBD()
    client.add_meta_context("base:allocation")
    client.connect_unix(address)
    return client


def image_header(bits):
    result = bytearray(112)
    result[0:8] = b"QFI\xfb" + struct.pack(">I", 3)
    result[20:32] = struct.pack(">IQ", bits, 1 << 20)
    result[96:104] = struct.pack(">II", 4, 112)
    return bytes(result)


def stored(begin, end):
    with open(disk, "rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def same(found, expected, begin, what):
    if found == expected:
        return
    wrong = [i for i in range(len(expected)) if i >= len(found) or found[i] != expected[i]]
    print("the latest requests:", *recent[-40:], sep="\n  ")
    raise SystemExit(
        f"{what}: {len(wrong)} wrong bytes, {begin + wrong[0]} to {begin + wrong[-1]}"
    )


clients = [connect() for _ in range(int(connections))]
size = clients[0].get_size()
model = bytearray(clients[0].pread(size, 0))
position = 512


def some_range():
    """On from the range before, beside a border, at the end, or anywhere."""
    global position
    length = random.choice(
        [1, random.randrange(1, 17), random.randrange(1, 700), random.randrange(4090, 4102),
         random.randrange(1, 30000), random.randrange(1, 30000), 65536, random.randrange(1, 150000)])
    where = random.random()
    if where < 0.45:
        begin = position
    elif where < 0.6:
        begin = random.randrange(size // 65536 + 1) * 65536 + random.choice([0, 0, -1, -3, 2])
    elif where < 0.7:
        begin = size - length
    else:
        begin = random.randrange(size)
    if not 512 <= begin < size:
        begin = 512 + random.randrange(size - 512)
    end = min(begin + length, size)
    position = end if end < size else 512
    return begin, end


class Request:
    """One request, begun; `end` waits for its answer and compares."""

    def __init__(self, kind, begin, end):
        self.number = random.randrange(len(clients))
        self.client = clients[self.number]
        self.kind, self.begin, self.end = kind, begin, end
        recent.append(f"{kind} connection={self.number} offset={begin} length={end - begin}")
        getattr(self, "begin_" + kind)()

    def length(self):
        return self.end - self.begin

    def fua(self):
        self.durable = random.random() < 0.15
        return nbd.CMD_FLAG_FUA if self.durable else 0

    def begin_write(self):
        self.data = random.randbytes(self.length()) if random.random() < 0.95 else bytes(self.length())
        self.cookie = self.client.aio_pwrite(
            nbd.Buffer.from_bytearray(bytearray(self.data)), self.begin, flags=self.fua())

    def finish_write(self):
        model[self.begin:self.end] = self.data
        if self.durable:
            same(stored(self.begin, self.end), self.data, self.begin, "stored by FUA")

    def begin_zero(self):
        flags = random.choice([0, nbd.CMD_FLAG_NO_HOLE]) | self.fua()
        if self.client.can_fast_zero() and random.random() < 0.3:
            flags |= nbd.CMD_FLAG_FAST_ZERO
        self.data = bytes(self.length())
        self.may_fail = flags & nbd.CMD_FLAG_FAST_ZERO
        self.cookie = self.client.aio_zero(self.length(), self.begin, flags=flags)

    finish_zero = finish_write

    def begin_trim(self):
        if not self.client.can_trim():
            self.cookie = None
            return
        self.cookie = self.client.aio_trim(self.length(), self.begin, flags=self.fua())

    def finish_trim(self):
        # Trimmed bytes may stay as they were, or as they were stored, or become zeros.
        found = self.client.pread(self.length(), self.begin)
        held = stored(self.begin, self.end)
        allowed = bytes(
            byte if byte in (0, old, below) else old
            for byte, old, below in zip(found, model[self.begin:self.end], held))
        same(found, allowed, self.begin, "read after a trim")
        model[self.begin:self.end] = found

    def begin_read(self):
        self.buffer = nbd.Buffer(self.length())
        self.cookie = self.client.aio_pread(self.buffer, self.begin)

    def finish_read(self):
        found = bytes(self.buffer.to_bytearray())
        same(found, model[self.begin:self.end], self.begin, "read")

    def begin_extents(self):
        if not self.client.can_meta_context("base:allocation"):
            self.cookie = None
            return
        self.found = []
        flags = random.choice([0, nbd.CMD_FLAG_REQ_ONE])

        def collect(context, offset, entries, error):
            assert offset == self.begin
            self.found += entries

        self.cookie = self.client.aio_block_status(self.length(), self.begin, collect, flags=flags)

    def finish_extents(self):
        offset = self.begin
        for length, state in zip(self.found[::2], self.found[1::2]):
            if state & nbd.STATE_ZERO:
                end = min(offset + length, size)
                same(bytes(end - offset), model[offset:end], offset, "said to be zeros")
            offset += length
        assert offset > self.begin, "no extents"

    def begin_cache(self):
        if not self.client.can_cache():
            self.cookie = None
            return
        self.cookie = self.client.aio_cache(self.length(), self.begin)

    def finish_cache(self):
        pass

    def finish(self):
        if self.cookie is None:
            return
        try:
            while not self.client.aio_command_completed(self.cookie):
                self.client.poll(-1)
        except nbd.Error as error:
            if getattr(self, "may_fail", False) and error.errnum == errno.ENOTSUP:
                return
            raise
        getattr(self, "finish_" + self.kind)()


def some_kind():
    return random.choices(
        ["write", "read", "zero", "trim", "extents", "cache"], [50, 20, 10, 8, 7, 1])[0]


def burst():
    ranges = []
    for _ in range(random.randrange(2, 9)):
        begin, end = some_range()
        if all(end <= other[0] or other[1] <= begin for other in ranges):
            ranges.append((begin, end))
    for request in [Request(some_kind(), begin, end) for begin, end in ranges]:
        request.finish()


def flush():
    recent.append("flush")
    random.choice(clients).flush()
    same(stored(0, size), model, 0, "stored after a flush")


def reconnect():
    number = random.randrange(len(clients))
    recent.append(f"reconnect {number}")
    if not shares:
        clients[number].flush()
    if random.random() < 0.5:
        clients[number].shutdown()
    else:
        # Without goodbye.
        clients[number] = None
        gc.collect()
    clients[number] = connect()


def write_header():
    """A header, or none, maybe in pieces."""
    if header == "none" or random.random() < 0.2:
        data = bytes(112)
    else:
        data = image_header(int(header) if random.random() < 0.6 else random.choice([9, 12, 16, 17]))
    cut = random.choice([112, 112, random.randrange(1, 112)])
    recent.append(f"header {data[23]}, cut at {cut}")
    client = random.choice(clients)
    for begin, end in ((0, cut), (cut, 112)):
        if begin < end:
            client.pwrite(data[begin:end], begin, random.choice([0, 0, nbd.CMD_FLAG_FUA]))
    model[:112] = data


if header != "none":
    clients[0].pwrite(image_header(int(header)), 0)
    model[:112] = image_header(int(header))
for _ in range(int(steps)):
    what = random.random()
    if what < 0.7:
        Request(some_kind(), *some_range()).finish()
    elif what < 0.85:
        burst()
    elif what < 0.92:
        flush()
    elif what < 0.96:
        reconnect()
    elif what < 0.975:
        write_header()
    else:
        same(random.choice(clients).pread(size, 0), model, 0, "read of everything")
for client in clients:
    same(client.pread(size, 0), model, 0, "read at the end")
with open(disk + ".expected", "wb") as expected:
    expected.write(model)
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
    # Nobody has flushed: what the connections left has to be stored all the same.
    stop_nbdkit server
    cmp "$work/disk" "$work/disk.expected" || fail "$what: other bytes are stored; SEED=$SEED"
}

disk=$work/disk
check "no header" 1048699 3 none file "$disk"
check "64K clusters" 1048699 4 16 file "$disk"
check "64K clusters, no background writers" 1048699 3 16 file "$disk" qcowcache-writers=0
check "one writer, little memory" 1048699 4 16 file "$disk" \
    qcowcache-writers=1 qcowcache-size=256K
check "no background writers, little memory" 1048699 3 12 file "$disk" \
    qcowcache-writers=0 qcowcache-size=200K
check "16 writers, 2M clusters" 4194427 4 21 file "$disk" qcowcache-writers=16 qcowcache-size=8M
check "no memory" 524411 3 16 file "$disk" qcowcache-size=0
check "a fixed cluster size" 524411 4 none file "$disk" qcowcache-cluster-size=64K
check "blocks of 512, at most 16K" 524288 3 16 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=512 blocksize-maximum=16K blocksize-error-policy=error qcowcache-writers=0
check "blocks of 4096" 1048576 4 16 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=4096 blocksize-error-policy=error
check "blocks of 64K" 1048576 3 12 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=64K blocksize-preferred=64K blocksize-error-policy=error \
    qcowcache-size=256K qcowcache-writers=1
check "no zero, no extents, no cache" 1048699 3 16 --filter=nozero --filter=noextents \
    --filter=nocache file "$disk" cachemode=none
check "zero as writes" 524411 3 16 --filter=nozero file "$disk" zeromode=emulate
check "FUA as flush" 524411 4 16 --filter=fua file "$disk" fuamode=emulate
check "no FUA" 524411 3 16 --filter=fua file "$disk" qcowcache-writers=0
check "serialised requests" 524411 4 16 --filter=noparallel file "$disk" serialize=all-requests
check "a cache for each connection" 524411 1 16 --filter=multi-conn file "$disk" \
    multi-conn-mode=disable
