#!/usr/bin/env bash
# The disk under an export's name is exchanged while somebody who is still
# connected sees the old one: what others write reaches the new disk and no
# other, they read nothing of the old one, and whatever the one who stayed does
# leaves the new disk alone.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 12M
disk=$work/disk
size=32M

# What a conversion makes without the filter.
fresh_file "$work/expected" "$size"
start_nbdkit plain file "$work/expected"
convert "$work/source" "$(uri plain)" 64k zlib
stop_nbdkit plain

# Each way to put another file in the old one's place: empty, what the disk was before anybody wrote
# to it ($work/copy), and full of other bytes where the old one had a hole.
made_anew () { rm "$disk" && truncate -s "$size" "$disk"; }
restored () { rm "$disk" && cp --sparse=always "$work/copy" "$disk"; }
renamed_over () { cp --sparse=always "$work/full" "$work/other" && mv "$work/other" "$disk"; }
linked_over () { truncate -s "$size" "$work/other" && ln -f "$work/other" "$disk" && rm "$work/other"; }

make_tar_image "$work/full" "$size"

# new_disk HEADER: the first disk, and its copy
new_disk ()
{
    fresh_file "$disk" "$size"
    [ "$1" = none ] || write_header "$disk" 16
    cp --sparse=always "$disk" "$work/copy"
}

# stays READS|WRITES: starts a client that is connected before the disk is
# exchanged, and reads from it, or writes to it and flushes; see story.
cat >"$work/story.py" <<'END'
import os, subprocess, sys, time
import nbd
from nbd_clients import connect

address, disk, does, exchange, then = sys.argv[1:]

old = b"old!" * 1000
staying = [connect(address) for _ in range(8)]
for i, client in enumerate(staying):
    if does == "writes":
        # A header, so that it is cached, and something of a block that newcomers write to.
        client.pwrite(old, (20 << 20) + i * 5000)
        client.pwrite(old, (1 << 20) + i * 9000)
        client.flush()
    client.pread(65536, 0)
    client.pread(4096, 1 << 20)

subprocess.run(exchange, shell=True, check=True, executable="/bin/bash")
before = open(disk, "rb").read()

def small(i):
    return bytes([i + 1]) * 333

def unflushed_of_the_old():
    """Those who stay go on, as far as their disk lets them."""
    for client in staying:
        try:
            if does == "writes":
                client.pwrite(old, 24 << 20)
                open(os.path.join(os.path.dirname(address), "acknowledged"), "w").close()
                client.flush()
            client.pread(4096, 28 << 20)
        except nbd.Error:
            pass # a far server that is gone

if then == "convert":
    # Those who stayed leave one after the other while the image grows.
    with subprocess.Popen(["qemu-img", "convert", "-c", "-t", "none", "-f", "raw", "-O", "qcow2",
                           "-o", "cluster_size=64k,compression_type=zlib",
                           os.environ["SOURCE"], "nbd+unix:///?socket=" + address]) as conversion:
        seen = os.stat(disk).st_blocks
        while conversion.poll() is None:
            grown = os.stat(disk).st_blocks
            if grown > seen + 1024 and len(staying) > 1:
                seen = grown
                unflushed_of_the_old()
                staying.pop().shutdown()
            time.sleep(0.001)
    assert conversion.returncode == 0, "convert fails"
    newcomer = connect(address)
    newcomer.flush()
    expected = open(os.environ["EXPECTED"], "rb").read()
    assert newcomer.pread(16 << 20, 0) == expected[:16 << 20], "not the image, as read by another client"
else:
    newcomer = connect(address)
    assert newcomer.pread(16 << 20, 0) == before[:16 << 20], "a newcomer reads the old disk"
    assert newcomer.pread(1 << 20, 20 << 20) == before[20 << 20:21 << 20], "a newcomer reads the old disk"
    expected = bytearray(before)
    for i in range(100):
        where = (1 << 20) + i * 9000 + 77
        newcomer.pwrite(small(i), where)
        expected[where:where + 333] = small(i)
        if i % 16 == 8 and len(staying) > 1:
            unflushed_of_the_old()
            staying.pop().shutdown()
    newcomer.flush()
    with open(disk, "rb") as file:
        stored = file.read()
    missing = sum(stored[(1 << 20) + i * 9000 + 77:][:333] != small(i) for i in range(100))
    assert missing == 0, f"after a flush {missing} of 100 writes are missing"
    assert stored == expected, "the new disk has bytes that nobody wrote to it"

while staying:
    unflushed_of_the_old()
    staying.pop().shutdown()
with open(disk, "rb") as file:
    assert file.read() == expected, "those who stayed have changed the new disk"
newcomer.shutdown()
END
export SOURCE=$work/source EXPECTED=$work/expected

# story SERVER DOES EXCHANGE THEN
story ()
{
    "$PYTHON" "$work/story.py" "$work/$1.sock" "$disk" "$2" "$3" "$4" || fail "$*: see above"
    echo "$*: ok"
}

# ended SERVER: the server ends, and the disk is the same afterwards.
ended ()
{
    cp --sparse=always "$disk" "$work/at-the-end"
    stop_nbdkit "$1"
    cmp "$disk" "$work/at-the-end" || fail "the end of the server has changed the new disk"
}

# Each exchange is a command of its own shell.
export disk size work
export -f made_anew restored renamed_over linked_over

echo "=== nbdkit's file plugin"
for writers in 4 0; do
    exchanges=(made_anew restored renamed_over linked_over)
    [ "$writers" -gt 0 ] || exchanges=(made_anew restored)
    for exchange in "${exchanges[@]}"; do
        for does in reads writes; do
            new_disk header
            start_nbdkit file --filter="$FILTER" file "$disk" qcowcache-writers="$writers" qcowcache-cluster-size=64K
            story file "$does" "$exchange" small-writes
            ended file
        done
        # What is left of the old bytes behind the image is no matter of the image.
        [ "$exchange" != renamed_over ] || continue
        new_disk none
        start_nbdkit file --filter="$FILTER" file "$disk" qcowcache-writers="$writers"
        story file reads "$exchange" convert
        ended file
        cmp "$disk" "$work/expected" || fail "not the image that is written without the filter"
        image_holds "$disk" "$work/source"
    done
done

# The far server is another one behind the same socket: the old one has been
# killed, or still serves those who are connected to it.
echo "=== nbdkit's nbd plugin"
moved () { ln -sfn "$work/far2.sock" "$work/far"; }
killed () { moved && kill -KILL "$(cat "$work/far1.pid")"; }
export -f moved killed
for exchange in moved killed; do
    for story in 'reads small-writes' 'writes small-writes' 'reads convert'; do
        read -r does afterwards <<<"$story"
        fresh_file "$work/old-disk" "$size"
        new_disk none
        start_nbdkit far1 file "$work/old-disk"
        start_nbdkit far2 file "$disk"
        ln -sfn "$work/far1.sock" "$work/far"
        rm -f "$work/acknowledged"
        parameters=()
        [ "$afterwards" = convert ] || parameters=(qcowcache-cluster-size=64K)
        # However slow the machine, nothing is stored because of its age.
        parameters+=(qcowcache-expire=0)
        start_nbdkit near --filter="$FILTER" nbd socket="$work/far" "${parameters[@]}"
        story near "$does" "$exchange" "$afterwards"
        ended near
        # What those who stayed could not store any more is reported, and nothing else.
        # Who may see another disk than a newcomer is asked to read first, and acknowledged nothing.
        if [ "$exchange $does" = 'killed writes' ] && [ -e "$work/acknowledged" ]; then
            grep -q 'lost .* bytes that were acknowledged' "$work/near.err" || fail "a loss is not reported"
        else
            ! grep 'lost .* bytes' "$work/near.err" || fail "a loss is reported that is none"
        fi
        stop_nbdkit far2
        kill_server far1 || : # which is not there, or needs no good end
    done
done
