#!/usr/bin/env bash
# Clients whose images are made to cost work, with qcowcache-verify: their
# checks get the right answer, a healthy client goes on beside them, and nbdkit
# ends when it is told to.
#
# LONG=1: a larger healthy image, and for longer.

source "$(dirname "$0")/functions.sh"

# hostile.py SOCKET EXPORT L1_ENTRIES BOMBS WHAT: an image of clusters of 2 MiB, in whose one L2
# table all 262144 entries are compressed clusters: streams of 2 KB, each of which becomes 2 MiB.
# There are so many of them, which the entries name in turn; so many entries of the L1 table name
# that L2 table.
#   good, bad   one flush has to say that the streams are, with WHAT=bad broken
#   endless     one check after the other, until it is killed
cat >"$work/hostile.py" <<'END'
import struct, sys, time, zlib
from nbd_clients import connect, error_of, image_header

socket, export, l1_entries, bombs, what = sys.argv[1:]
l1_entries, bombs = int(l1_entries), int(bombs)
cluster = 2 << 20
count = cluster // 8
l1, l2, data = cluster, 2 * cluster, 3 * cluster

compressor = zlib.compressobj(9, zlib.DEFLATED, -12, 9)
stream = compressor.compress(bytes(cluster)) + compressor.flush()
apart = 4096
assert len(stream) < apart
if what == "bad":
    stream = stream[:1000] + b"\xff" * (len(stream) - 1000)

sectors = (len(stream) - 1) // 512
shift = 62 - (21 - 8)
entries = b"".join(struct.pack(">Q", 1 << 62 | sectors << shift | data + i % bombs * apart)
                   for i in range(count))

client = connect(socket, export)
client.pwrite(image_header(21, size=count * cluster, l1=(l1_entries, l1)), 0)
region = stream.ljust(apart, b"\0") * bombs
for begin in range(0, len(region), cluster):
    # Whole clusters, and so nobody takes them for streams before they are checked.
    client.pwrite(region[begin:begin + cluster].ljust(cluster, b"\0"), data + begin)
client.pwrite(struct.pack(">Q", l2) * l1_entries, l1)

began = time.monotonic()
while True:
    client.pwrite(entries, l2)
    print("checks", flush=True)
    said = error_of(client.flush)
    assert what == "endless" or said == {"good": None, "bad": "EIO"}[what], f"the flush says {said}"
    if what != "endless":
        break
    client.pwrite(bytes(cluster), l2)
print(f"{time.monotonic() - began:.1f} s")
END

serve ()
{
    rm -rf "$work/disks"
    mkdir "$work/disks"
    for export in healthy h1 h2 h3 h4 h5; do
        truncate -s 1G "$work/disks/$export"
    done
    start_nbdkit server --filter="$FILTER" file dir="$work/disks" qcowcache-verify=error
}

# hostile EXPORT ARGUMENT...: in the background
hostile ()
{
    "$PYTHON" "$work/hostile.py" "$work/server.sock" "$@" >"$work/hostile.$1" 2>&1 &
    other_pids+=($!)
}
checks () { [ -s "$work/hostile.$1" ]; }
other_pids=()
kill_others ()
{
    [ "${#other_pids[@]}" -gt 0 ] || return 0
    kill -KILL "${other_pids[@]}" 2>/dev/null || :
    wait "${other_pids[@]}" 2>/dev/null || :
    other_pids=()
}
cleanup_fn kill_others

seconds_since () { awk -v begin="$1" -v end="$(date +%s.%N)" 'BEGIN { printf "%.2f\n", end - begin }'; }
at_most () { awk -v found="$1" -v most="$2" 'BEGIN { exit !(found <= most) }'; }

echo "262144 entries, and 262 million, that name one stream are checked in seconds"
serve
while read -r export l1_entries what; do
    timeout 60 "$PYTHON" "$work/hostile.py" "$work/server.sock" "$export" "$l1_entries" 1 "$what" ||
        fail "$l1_entries x 262144 entries: no right answer in a minute"
done <<'END'
h1 1 good
h2 1 bad
h3 1000 good
h4 1000 bad
END
stop_nbdkit server

echo "a healthy conversion goes on beside five hostile clients"
size=32M
[ "${LONG:-}" != 1 ] || size=256M
make_tar_image "$work/source" "$size"
healthy ()
{
    local begin
    begin=$(date +%s.%N)
    timeout 300 qemu-img convert -c -t none -f raw -O qcow2 "$work/source" "$(uri server healthy)" ||
        fail "the healthy conversion fails"
    seconds_since "$begin"
}
# The same load on the processors, but for what the filter does for it.
spin () { while :; do :; done; }
serve
for _ in 1 2 3 4 5; do
    spin &
    other_pids+=($!)
done
alone=$(healthy)
kill_others
stop_nbdkit server
serve
for i in 1 2 3 4 5; do
    hostile "h$i" 1 4096 endless
done
for i in 1 2 3 4 5; do
    wait_until 60 checks "h$i" || fail "hostile client $i does not begin"
done
beside=$(healthy)
echo "alone: $alone s, beside five hostile clients: $beside s"
at_most "$beside" "$(awk -v alone="$alone" 'BEGIN { print 3 * alone + 1 }')" ||
    fail "a healthy conversion that takes $alone s alone takes $beside s beside hostile clients"
for i in 1 2 3 4 5; do
    kill -0 "${other_pids[$((i - 1))]}" || fail "hostile client $i has ended: $(cat "$work/hostile.h$i")"
done

echo "nbdkit ends while five images are checked, three of them for nobody any more"
kill -KILL "${other_pids[@]:0:3}"
wait "${other_pids[@]:0:3}" 2>/dev/null || :
begin=$(date +%s.%N)
kill -TERM "${server_pid[server]}"
wait_until 60 server_has_ended server || fail "nbdkit does not end"
took=$(seconds_since "$begin")
echo "ended within $took s"
end_of_nbdkit server
at_most "$took" 5 || fail "nbdkit ends after $took s"
kill_others
image_holds "$work/disks/healthy" "$work/source"
for i in 1 2 3 4 5; do
    told=$(grep -c "export \"h$i\": compressed clusters could not be checked" "$work/server.err" || :)
    [ "$told" -eq 1 ] || fail "what was not checked of h$i is told $told times: $(cat "$work/server.err")"
done

echo "a client that goes on writing to a damaged cluster delays nobody's flush"
serve
python "$work/server.sock" <<'END'
import struct, sys, threading, time
from nbd_clients import connect, error_of, image_header

client = connect(sys.argv[1], "h1")
client.pwrite(image_header(size=8192 * 65536, l1=(1, 65536)), 0)
client.pwrite(struct.pack(">Q", 131072), 65536)
client.pwrite(struct.pack(">Q", 1 << 62 | 255 << 54 | 196608), 131072)
ended = False
writes = 0
def rewrite():
    global writes
    other = connect(sys.argv[1], "h1")
    while not ended:
        other.pwrite(b"\xff" * 60000, 196608)
        writes += 1
threads = [threading.Thread(target=rewrite) for _ in range(4)]
for thread in threads:
    thread.start()
while writes < 100:
    time.sleep(0.01)
begin = time.monotonic()
assert error_of(client.flush) == "EIO", "the flush succeeds"
took = time.monotonic() - begin
ended = True
for thread in threads:
    thread.join()
print(f"flush: {took:.1f} s, beside {writes} writes")
assert took < 20, "the flush had to wait"
END
stop_nbdkit server
