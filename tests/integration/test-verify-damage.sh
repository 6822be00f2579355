#!/usr/bin/env bash
# A client that damages compressed clusters: with qcowcache-verify=error each
# flush fails until the damage is repaired, with warn it is reported, and with
# off nobody says anything.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 4M
for type in zlib zstd; do
    convert "$work/source" "$work/$type.qcow2" 64k "$type"
done
convert "$work/source" "$work/extended.qcow2" 64k zlib -o extended_l2=on

# damages SERVER MODE IMAGE OTHER TOGETHER: writes IMAGE, with so many damages at a time, and
# repairs them one by one
cat >"$work/damages.py" <<'END'
import random, struct, sys
from nbd_clients import connect, error_of
from qcow2 import CompressedClusters

address, mode, image, other, together = sys.argv[1:]
good = open(image, "rb").read()
good += bytes(-len(good) % 65536 + 65536)
random.seed(6)
clusters = CompressedClusters(good)
cluster, l2, width, entries, place = clusters.cluster, clusters.l2, clusters.width, clusters.entries, clusters.place
assert len(entries) > 20, "hardly anything in this image is compressed"
client = connect(address)

def flush_succeeds():
    error = error_of(client.flush)
    assert error in (None, "EIO"), error
    return not error

def put(entry, index):
    client.pwrite(struct.pack(">Q", entry), l2 + index * width)

kinds = ["left out", "zeros", "truncated", "overwritten", "overwritten after its entry",
         "a sector short", "a byte off", "the other codec", "past the end"]
# None are neighbours: what lies in a cluster's last sector behind its stream belongs to the next.
damaged = dict(zip(kinds, random.sample(sorted(entries)[::2], len(kinds))))

# All but the entries: nothing is reachable yet. And all but the stream that is left out, in whose
# place are other bytes from earlier.
left_out, length = place(entries[damaged["left out"]])
assert any(client.pread(length, left_out)), "the disk is empty where nothing will be written"
for begin in range(0, len(good), 65536):
    end = begin + 65536
    piece = bytes(65536) if begin == l2 else good[begin:end]
    for first, last in (begin, min(end, left_out)), (max(begin, left_out + length), end):
        if first < last:
            client.pwrite(piece[first - begin:last - begin], first)
client.flush()

def publish(index, before=None, entry=None, after=None):
    offset, _ = place(entries[index])
    if before is not None:
        client.pwrite(before, offset)
    put(entries[index] if entry is None else entry, index)
    if after is not None:
        client.pwrite(after, offset)

def damage(what, index):
    offset, length = place(entries[index])
    original = good[offset:offset + length]
    if what == "left out":
        publish(index)
    elif what == "zeros":
        publish(index, before=bytes(length))
    elif what == "truncated":
        publish(index, before=original[:length // 2] + bytes(length - length // 2))
    elif what == "overwritten":
        publish(index, before=original[:20] + b"\xff" * (length - 20))
    elif what == "overwritten after its entry":
        publish(index, before=original, after=b"\xff" * length)
    elif what == "a sector short":
        # The last one holds the last byte of the stream, if not more.
        assert clusters.more_sectors(entries[index]) > 0, "this cluster has one sector"
        publish(index, entry=clusters.with_a_sector_less(entries[index]))
    elif what == "a byte off":
        publish(index, entry=entries[index] + 1)
    elif what == "the other codec":
        foreign = open(other, "rb").read()
        begin = CompressedClusters(foreign).streams()[0]
        publish(index, before=foreign[begin:begin + length])
    else:
        publish(index, entry=clusters.at(entries[index], client.get_size() + 512))

def repair(index):
    offset, length = place(entries[index])
    client.pwrite(good[offset:offset + length], offset)
    put(entries[index], index)

for first in range(0, len(kinds), int(together)):
    group = kinds[first:first + int(together)]
    for what in group:
        damage(what, damaged[what])
    for _ in range(2):
        assert flush_succeeds() == (mode != "error"), f"{group}: flush says {mode == 'error'}"
    for what in group:
        repair(damaged[what])
        expected = mode != "error" or what == group[-1]
        assert flush_succeeds() == expected, f"{group}: flush says {not expected}, {what} is repaired"
        print(f"{what}: host {place(entries[damaged[what]])[0]} guest {damaged[what] * cluster}")

# In the end the whole image is there, and good.
client.pwrite(good[l2:l2 + cluster], l2)
assert flush_succeeds(), "the good image is refused"
client.shutdown()
END

# damaged_image IMAGE MODE TOGETHER FILTER...: nothing is refused or reported but what is damaged, on
# a disk with an older image, of the other codec
damaged_image ()
{
    local image=$1 mode=$2 together=$3 other=zstd what places host guest
    shift 3
    echo "$image, $mode, $together at a time, $*"
    [ "$image" != zstd ] || other=zlib
    cp "$work/$other.qcow2" "$work/disk"
    truncate -s 16M "$work/disk"
    start_nbdkit server --filter="$FILTER" "$@" file "$work/disk" "qcowcache-verify=$mode"
    "$PYTHON" "$work/damages.py" "$work/server.sock" "$mode" \
        "$work/$image.qcow2" "$work/$other.qcow2" "$together" >"$work/damages"
    stop_nbdkit server
    cat "$work/damages"
    qemu-img compare -q -f qcow2 -F raw "$work/disk" "$work/source" || fail "the repaired image is not good"
    if [ "$mode" = off ]; then
        ! grep qcowcache "$work/server.err" || fail "something is said with off"
        return
    fi
    while IFS=: read -r what places; do
        read -r _ host _ guest <<<"$places"
        case $what in
            "a byte off") host=$((host + 1)) ;;
            "past the end") host=$((16 * 1048576 + 512)) ;;
        esac
        grep -q "qcowcache: export \"\": .*host offset $host, guest offset $guest, " \
            "$work/server.err" || fail "$image, $mode: $what is not reported: $(cat "$work/server.err")"
    done <"$work/damages"
    [ "$(grep -c ", guest offset .* cannot be read: " "$work/server.err")" -eq "$(wc -l <"$work/damages")" ] ||
        fail "$image, $mode: more is reported than was damaged: $(cat "$work/server.err")"
    grep -q "cannot be read: past the end of the file" "$work/server.err" || fail "not said: past the end"
    grep -q "cannot be read: never written" "$work/server.err" || fail "not said: never written"
}

for image in zlib zstd extended; do
    for mode in error warn off; do
        # Where requests come one at a time no check waits for data that may be late.
        damaged_image "$image" "$mode" 1 --filter=noparallel
    done
done
# Elsewhere each check waits for seconds, so it is given more to find: as much as it tells of.
damaged_image zstd error 4

echo "what a connection leaves behind unchecked is checked at its end"
fresh_file "$work/disk" 16M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-verify=warn
run_client server "$work/zlib.qcow2" <<'END'
good = bytearray(open(arguments[0], "rb").read())
offset = CompressedClusters(good).streams()[0]
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
run_client server "$work/zlib.qcow2" <<'END'
good = open(arguments[0], "rb").read()
offset = CompressedClusters(good).streams()[0]
for begin in range(0, len(good), 65536):
    client.pwrite(good[begin:begin + 65536], begin)
client.pwrite(b"\xff" * 300, offset)
client.shutdown()
for _ in range(2):
    client = connect(address)
    assert error_of(client.flush) == "EIO", "a later connection's flush succeeds"
    client.shutdown()
client = connect(address)
client.pwrite(good[offset:offset + 300], offset)
client.flush()
client.shutdown()
connect(address).flush()
END
stop_nbdkit server
image_holds "$work/disk" "$work/source"
