#!/usr/bin/env bash
# Monitoring that connects, asks how large the export is and leaves: what the
# writer writes meanwhile reaches storage in as few writes as without it.  One that
# reads data, too, may have to see that both use the same disk: that costs no more
# than a write for each time.

source "$(dirname "$0")/functions.sh"

# writes ONLOOKER: 1000 writes of 9001 bytes each, which become $writes; every
# few of them somebody comes, looks as ONLOOKER says, and goes.  Nothing is
# merged, for how much that saves depends on how long storage takes.
writes ()
{
    fresh_image "$work/disk" 16M 16
    start_nbdkit server --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/below.log" \
        qcowcache-expire=0 qcowcache-max-write=64K
    python "$work/server.sock" "$work/disk" "$1" <<'END'
import sys
from nbd_clients import connect, stored
address, disk, onlooker = sys.argv[1:]

def looks():
    client = connect(address)
    assert client.get_size() == 16 << 20
    if onlooker == "reads":
        client.pread(4096, 0)
    elif onlooker == "maps":
        client.block_status(4096, 0, lambda *ignored: 0)
    elif onlooker == "dies":
        return
    client.shutdown()

def expected(step):
    return bytes([step % 250 + 1]) * 9001

writer = connect(address)
for step in range(1000):
    writer.pwrite(expected(step), (1 << 20) + step * 9001)
    if step % 3 == 0 and onlooker != "none":
        looks()
writer.flush()
for step in range(1000):
    assert stored(disk, (1 << 20) + step * 9001, 9001) == expected(step), f"write {step} is not stored"
END
    stop_nbdkit server
    writes=$(count_log "$work/below.log" writes)
    echo "onlooker $1: $writes writes"
}

writes none
alone=$writes
for onlooker in asks dies reads maps; do
    writes "$onlooker"
    times=0
    case $onlooker in reads | maps) times=334 ;; esac
    [ "$writes" -le $((alone * 11 / 10 + times)) ] ||
        fail "$writes writes reach storage beside an onlooker that $onlooker, $alone without"
done
