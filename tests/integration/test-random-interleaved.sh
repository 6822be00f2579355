#!/usr/bin/env bash
# Several connections write, zero, trim, flush and read at once, each in bytes
# of its own that lie between those of the others inside the same 4 KiB blocks.
# At the end, and whenever all pause, every byte is the one last written to it.
#
#   SEED=N   repeat a run (each prints its seed)

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

: "${SEED:=$RANDOM}"

# compare WHAT SIZE HEADER NBDKIT-ARGUMENT...
compare ()
{
    local what=$1 size=$2 header=$3 stop_status=0
    shift 3
    fresh_file "$work/disk" "$size"
    start_nbdkit server --filter="$FILTER" "$@"
    echo "$what: seed $SEED"
    python "$work/server.sock" "$work/disk" "$SEED" "$header" <<'END' || stop_status=$?
import nbd, random, struct, sys, threading

address, disk, seed, header = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
WRITERS = 4
ROUNDS = 12
STEPS = 60

def image_header(bits):
    result = bytearray(512)
    result[0:8] = b"QFI\xfb" + struct.pack(">I", 3)
    result[20:32] = struct.pack(">IQ", bits, 1 << 20)
    result[96:104] = struct.pack(">II", 4, 112)
    return bytes(result)

def connect():
    client = nbd.NBD()
    client.connect_unix(address)
    return client

clients = [connect() for _ in range(WRITERS)]
size = clients[0].get_size()
model = bytearray(clients[0].pread(size, 0))
reserved = 512 if header != "none" else 0
if header != "none":
    first = image_header(int(header.split("-")[0]))
    clients[0].pwrite(first, 0)
    model[:512] = first
failures = []

class Writer:
    """Owns every fourth stripe; stripes are so narrow that all share blocks."""

    def __init__(self, number, stripe):
        self.random = random.Random(seed * 100 + number)
        self.client = clients[number]
        self.number = number
        self.stripe = stripe

    def some_range(self):
        stripes = (size - reserved) // self.stripe + 1
        mine = self.random.randrange(self.number, stripes + WRITERS, WRITERS)
        if self.random.random() < 0.1:
            # The end of the export, where sizes are odd.
            mine = stripes - 1 - (stripes - 1 - self.number) % WRITERS
        begin = reserved + mine * self.stripe
        end = min(begin + self.stripe, size)
        if begin >= end:
            return None
        if self.random.random() < 0.5:
            begin = self.random.randrange(begin, end)
            end = self.random.randrange(begin, end) + 1
        return begin, end

    def step(self):
        chosen = self.some_range()
        if chosen is None:
            return
        begin, end = chosen
        length = end - begin
        kind = self.random.choice("wwwwwwwFFzZtrrrf")
        if kind in "wF":
            data = self.random.randbytes(length)
            self.client.pwrite(data, begin, nbd.CMD_FLAG_FUA if kind == "F" else 0)
            model[begin:end] = data
        elif kind in "zZ":
            self.client.zero(length, begin, nbd.CMD_FLAG_FUA if kind == "Z" else nbd.CMD_FLAG_NO_HOLE)
            model[begin:end] = bytes(length)
        elif kind == "t" and self.client.can_trim():
            self.client.trim(length, begin)
            # Trimmed bytes may stay or become zeros, but must be the one or the other from then on.
            found = self.client.pread(length, begin)
            for i in range(length):
                if found[i] not in (0, model[begin + i]):
                    raise AssertionError(f"byte {begin + i} is neither old nor zero after a trim")
            model[begin:end] = found
        elif kind == "f":
            self.client.flush()
        else:
            found = self.client.pread(length, begin)
            if found != model[begin:end]:
                raise AssertionError(f"connection {self.number} does not read its own bytes at {begin}+{length}")

    def run(self):
        try:
            for _ in range(STEPS):
                self.step()
        except BaseException as failure:
            failures.append(failure)

def compare_all(found, where):
    if found == model:
        return
    wrong = [i for i in range(size) if found[i] != model[i]]
    raise SystemExit(f"{where}: {len(wrong)} wrong bytes, {wrong[0]} to {wrong[-1]}")

chooser = random.Random(seed)
for number in range(ROUNDS):
    stripe = chooser.choice([1, 37, 511, 700, 1024, 3000, 20000])
    writers = [threading.Thread(target=Writer(i, stripe).run) for i in range(WRITERS)]
    for writer in writers:
        writer.start()
    if header.endswith("changing"):
        for _ in range(5):
            newer = chooser.choice([image_header(b) for b in (9, 12, 16, 21)] + [bytes(512)])
            extra = connect()
            extra.pwrite(newer, 0)
            model[:512] = newer
            extra.shutdown()
    for writer in writers:
        writer.join()
    if failures:
        raise failures[0]
    compare_all(chooser.choice(clients).pread(size, 0), f"round {number}, stripes of {stripe}")
    if number % 3 == 2:
        chooser.choice(clients).flush()
        compare_all(open(disk, "rb").read(size), f"round {number}, stored after a flush")
    if number % 4 == 3:
        # A client that leaves and another one that takes its place.
        leaving = chooser.randrange(WRITERS)
        clients[leaving].shutdown()
        clients[leaving] = connect()

with open(disk + ".expected", "wb") as expected:
    expected.write(model)
END
    [ "$stop_status" -eq 0 ] || fail "$what: SEED=$SEED repeats it"
    stop_nbdkit server
    cmp "$work/disk" "$work/disk.expected" || fail "$what: stored bytes differ; SEED=$SEED repeats it"
}

disk=$work/disk
compare "without a header" 1048699 none file "$disk"
compare "64k clusters" 1048699 16 file "$disk"
compare "little memory" 2097275 16 file "$disk" qcowcache-size=256K
compare "2M clusters" 4194427 21 file "$disk" qcowcache-size=4M
compare "clusters that change" 1048699 16-changing file "$disk" qcowcache-size=8M
compare "blocks of 4096" 1048576 16 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=4096 blocksize-error-policy=error
compare "blocks of 64K, little memory" 1048576 12 --filter=blocksize-policy file "$disk" \
    blocksize-minimum=64K blocksize-preferred=64K blocksize-error-policy=error \
    qcowcache-size=256K
compare "blocks of 4096, no header" 1048576 none --filter=blocksize-policy file "$disk" \
    blocksize-minimum=4096 blocksize-error-policy=error
compare "no extents, no zero" 1048699 16 --filter=noextents --filter=nozero file "$disk"
compare "serialised requests" 1048699 16 --filter=noparallel file "$disk" serialize=requests
compare "serialised server" 1048699 16 --filter=noparallel file "$disk" serialize=all-requests
compare "one thread a connection" 1048699 16 file "$disk" -t 1 qcowcache-size=256K
compare "slow storage" 524411 16 --filter=delay file "$disk" wdelay=1ms rdelay=1ms qcowcache-size=256K
