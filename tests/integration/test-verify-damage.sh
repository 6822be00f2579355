#!/usr/bin/env bash
# A client that damages compressed clusters: with qcowcache-verify=error each
# flush fails until the damage is repaired, with warn it is reported, and with
# off nobody says anything.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

make_tar_image "$work/source" 4M
for type in zlib zstd; do
    convert "$work/source" "$work/$type.qcow2" 64k "$type"
done
convert "$work/source" "$work/extended.qcow2" 64k zlib -o extended_l2=on

# damages SERVER MODE IMAGE OTHER: writes IMAGE, with one damage at a time, and repairs it
cat >"$work/damages.py" <<'END'
import errno, nbd, random, struct, sys

address, mode, image, other = sys.argv[1:]
good = open(image, "rb").read()
good += bytes(-len(good) % 65536 + 65536)
random.seed(6)
bits = struct.unpack(">I", good[20:24])[0]
cluster = 1 << bits
l1 = struct.unpack(">Q", good[40:48])[0]
l2 = struct.unpack(">Q", good[l1:l1 + 8])[0] & 0x00fffffffffffe00
width = 16 if struct.unpack(">Q", good[72:80])[0] & 16 else 8
shift = 62 - (bits - 8)

entries = {}
for index in range(cluster // width):
    entry = struct.unpack(">Q", good[l2 + index * width:l2 + index * width + 8])[0]
    if entry >> 62 & 1:
        entries[index] = entry
assert len(entries) > 20, "hardly anything in this image is compressed"

def place(entry):
    offset = entry & (1 << shift) - 1
    length = ((entry >> shift & (1 << bits - 8) - 1) + 1) * 512 - offset % 512
    return offset, length

client = nbd.NBD()
client.connect_unix(address)

def flush_succeeds():
    try:
        client.flush()
        return True
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error.errno
        return False

def put(entry, index):
    client.pwrite(struct.pack(">Q", entry), l2 + index * width)

# All but the entries: nothing is reachable yet.
for begin in range(0, len(good), 65536):
    piece = bytearray(good[begin:begin + 65536])
    if begin == l2:
        piece = bytearray(65536)
    client.pwrite(bytes(piece), begin)
client.flush()

def damage(what, index, before=None, entry=None, after=None):
    """Publishes a damaged cluster, then repairs it."""
    offset, length = place(entries[index])
    original = good[offset:offset + length]
    if before is not None:
        client.pwrite(before, offset)
    put(entries[index] if entry is None else entry, index)
    if after is not None:
        client.pwrite(after, offset)
    expected = mode != "error"
    for _ in range(2):
        assert flush_succeeds() == expected, f"{what}: flush says {not expected}"
    client.pwrite(original, offset)
    put(entries[index], index)
    assert flush_succeeds(), f"{what}: repaired, but flush fails"
    print(f"{what}: host {offset} guest {index * cluster}")

indices = iter(random.sample(sorted(entries), 20))
for what in ("left out", "truncated", "overwritten", "overwritten after its entry", "a sector short",
             "a byte off", "the other codec", "past the end"):
    index = next(indices)
    offset, length = place(entries[index])
    original = good[offset:offset + length]
    if what == "left out":
        damage(what, index, before=bytes(length))
    elif what == "truncated":
        damage(what, index, before=original[:length // 2] + bytes(length - length // 2))
    elif what == "overwritten":
        damage(what, index, before=original[:20] + b"\xff" * (length - 20))
    elif what == "overwritten after its entry":
        damage(what, index, before=original, after=b"\xff" * length)
    elif what == "a sector short":
        # What is cut off must be a part of the stream.
        damage(what, index, entry=entries[index] - (3 << shift))
    elif what == "a byte off":
        damage(what, index, entry=entries[index] + 1)
    elif what == "the other codec":
        foreign = open(other, "rb").read()
        other_l1 = struct.unpack(">Q", foreign[40:48])[0]
        other_l2 = struct.unpack(">Q", foreign[other_l1:other_l1 + 8])[0] & 0x00fffffffffffe00
        foreign_entry = next(e for e in struct.unpack(">8192Q", foreign[other_l2:other_l2 + 65536]) if e >> 62 & 1)
        begin = foreign_entry & (1 << shift) - 1
        damage(what, index, before=foreign[begin:begin + length])
    else:
        size = client.get_size()
        damage(what, index, entry=(entries[index] >> shift << shift) | (size + 512))

# In the end the whole image is there, and good.
client.pwrite(good[l2:l2 + cluster], l2)
assert flush_succeeds(), "the good image is refused"
client.shutdown()
END

for image in zlib zstd extended; do
    other=zstd
    [ "$image" != zstd ] || other=zlib
    for mode in error warn off; do
        echo "$image, $mode"
        fresh_file "$work/disk" 16M
        # Where requests come one at a time no check waits for data that may be late.
        start_nbdkit server --filter="$FILTER" --filter=noparallel file "$work/disk" \
            "qcowcache-verify=$mode"
        "$PYTHON" "$work/damages.py" "$work/server.sock" "$mode" \
            "$work/$image.qcow2" "$work/$other.qcow2" >"$work/damages"
        stop_nbdkit server
        cat "$work/damages"
        qemu-img compare -q -f qcow2 -F raw "$work/disk" "$work/source" || fail "the repaired image is not good"
        if [ "$mode" = off ]; then
            ! grep qcowcache "$work/server.err" || fail "something is said with off"
        else
            while IFS=: read -r what places; do
                read -r _ host _ guest <<<"$places"
                case $what in
                    "a byte off") host=$((host + 1)) ;;
                    "past the end") host=$((16 * 1048576 + 512)) ;;
                esac
                grep -q "qcowcache: export \"\": .*host offset $host, guest offset $guest, " \
                    "$work/server.err" || fail "$image, $mode: $what is not reported: $(cat "$work/server.err")"
            done <"$work/damages"
            grep -q "cannot be read: past the end of the file" "$work/server.err" || fail "not said: past the end"
            grep -q "cannot be read: never written" "$work/server.err" || fail "not said: never written"
        fi
    done
done

echo "what a connection leaves behind unchecked is checked at its end"
fresh_file "$work/disk" 16M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-verify=warn
python "$work/server.sock" "$work/zlib.qcow2" <<'END'
import nbd, struct, sys
client = nbd.NBD()
client.connect_unix(sys.argv[1])
good = bytearray(open(sys.argv[2], "rb").read())
l1 = struct.unpack(">Q", good[40:48])[0]
l2 = struct.unpack(">Q", good[l1:l1 + 8])[0] & 0x00fffffffffffe00
offset = next(e for e in struct.unpack(">8192Q", good[l2:l2 + 65536]) if e >> 62 & 1) & (1 << 54) - 1
good[offset:offset + 300] = b"\xff" * 300
for begin in range(0, len(good), 65536):
    client.pwrite(bytes(good[begin:begin + 65536]), begin)
client.shutdown()
END
is_reported () { grep -q 'qcowcache: export "": .* cannot be read' "$work/server.err"; }
wait_until 30 is_reported || fail "not reported: $(cat "$work/server.err")"
stop_nbdkit server

echo "a later connection is told, too, until the damage is repaired"
fresh_file "$work/disk" 16M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-verify=error
python "$work/server.sock" "$work/zlib.qcow2" <<'END'
import errno, nbd, struct, sys

def connect():
    client = nbd.NBD()
    client.connect_unix(sys.argv[1])
    return client

def refused(client):
    try:
        client.flush()
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error.errno
        return True
    return False

good = open(sys.argv[2], "rb").read()
l1 = struct.unpack(">Q", good[40:48])[0]
l2 = struct.unpack(">Q", good[l1:l1 + 8])[0] & 0x00fffffffffffe00
offset = next(e for e in struct.unpack(">8192Q", good[l2:l2 + 65536]) if e >> 62 & 1) & (1 << 54) - 1
client = connect()
for begin in range(0, len(good), 65536):
    client.pwrite(good[begin:begin + 65536], begin)
client.pwrite(b"\xff" * 300, offset)
client.shutdown()
for _ in range(2):
    client = connect()
    assert refused(client), "a later connection's flush succeeds"
    client.shutdown()
client = connect()
client.pwrite(good[offset:offset + 300], offset)
assert not refused(client), "repaired, but flush fails"
client.shutdown()
assert not refused(connect())
END
stop_nbdkit server
image_holds "$work/disk" "$work/source"
