#!/usr/bin/env bash
# Storage that damages one byte in 100 000 of what it stores, and says nothing:
# with qcowcache-readback=true each damage is found, and healed or reported.

source "$(dirname "$0")/functions.sh"

make_uneven_plugin

# write_all SERVER: compressed clusters as qemu writes them, and others in
# between; flushes until all is stored, then looks at what storage has once it
# does no damage any more.  Prints how many flushes failed, and how many bytes
# are wrong.
write_all ()
{
    touch "$work/damages"
    run_client "$1" "$work/damages" <<'END'
random.seed(7)
expected = bytearray(24 << 20)

def write(data, position, flags=0):
    for attempt in range(100):
        if not (error := error_of(lambda: client.pwrite(data, position, flags))):
            break
        assert error == "EIO", error
    expected[position:position + len(data)] = data

failed = 0
def flush():
    global failed
    for attempt in range(200):
        if not (error := error_of(client.flush)):
            return
        assert error == "EIO", error
        failed += 1
    raise SystemExit("200 flushes failed")

write(image_header(length=512), 0)
position = 65536
while position < 20 << 20:
    data = random.randbytes(random.randrange(500, 60000))
    write(data, position)
    position += len(data)
    if random.randrange(20) == 0:
        position = (position + 65535) // 65536 * 65536
        write(random.randbytes(65536), position)
        position += 65536
    if random.randrange(40) == 0:
        write(random.randbytes(100), random.randrange(65536, position), nbd.CMD_FLAG_FUA)
    if random.randrange(30) == 0:
        flush()
flush()
client.shutdown()
os.unlink(arguments[0])

client = connect(address)
stored = b"".join(client.pread(1 << 20, i << 20) for i in range(24))
print(failed, sum(a != b for a, b in zip(stored, expected)))
END
}

reported () { grep -c 'qcowcache: .*other bytes than were written' "$work/$1.err" || :; }

echo "without it nobody notices"
start_nbdkit server --filter="$FILTER" "$uneven_plugin" kind=damaging damages="$work/damages"
read -r failed wrong <<<"$(write_all server)"
stop_nbdkit server
[ "$wrong" -gt 0 ] || fail "the plugin does no damage: this test proves nothing"
[ "$failed" -eq 0 ] || fail "$failed flushes failed without readback"

for writers in 4 0; do
    echo "with it every damage is found, and in the end all is stored: qcowcache-writers=$writers"
    start_nbdkit server --filter="$FILTER" "$uneven_plugin" kind=damaging damages="$work/damages" \
        qcowcache-readback=true "qcowcache-writers=$writers"
    read -r failed wrong <<<"$(write_all server)"
    stop_nbdkit server
    [ "$wrong" -eq 0 ] || fail "$wrong bytes are wrong though a flush was acknowledged in the end"
    [ "$failed" -gt 0 ] || fail "no flush failed, so what storage damaged was not refused"
    [ "$(reported server)" -gt 100 ] || fail "only $(reported server) damages were reported"
    grep -q 'qcowcache: export ""' "$work/server.err" || fail "no message names the export"
done

echo "storage that does no damage gets one read for each write, and nobody sees a difference"
fresh_file "$work/disk" 24M
start_nbdkit server --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/below.log" \
    qcowcache-readback=true
read -r failed wrong <<<"$(write_all server)"
stop_nbdkit server
[ "$failed,$wrong" = 0,0 ] || fail "$failed flushes failed, $wrong bytes are wrong on sound storage"
[ "$(reported server)" -eq 0 ] || fail "a difference was reported on sound storage"
python "$work/below.log" <<'END'
import re, sys
# Each write has its own read behind it, of the same bytes, before the next one there. Nothing else
# is read but the header, what the second client asks for in the end, and a block or two of which
# the client has just written a part with FUA: they are written next.
request = re.compile(r"connection=(\d+) (Read|Write) id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)")
owed = set()
filled_up = []
writes = 0
for line in open(sys.argv[1]):
    found = request.search(line)
    if not found:
        continue
    where = offset, count = int(found[3], 16), int(found[4], 16)
    if found[2] == "Write":
        assert where not in owed, f"not read back: {where}"
        owed.add(where)
        writes += 1
        filled_up = [(begin, size) for begin, size in filled_up
                     if begin < offset or begin + size > offset + count]
    elif where in owed:
        owed.remove(where)
    elif where != (0, 4096) and found[1] != "2":
        assert count <= 8192, f"nobody wrote this or asked for it: {line}"
        filled_up.append(where)
assert writes and not owed, f"{len(owed)} of {writes} writes were not read back"
assert not filled_up, f"nobody wrote these, or asked for them: {filled_up}"
END
