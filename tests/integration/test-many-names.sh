#!/usr/bin/env bash
# Clients choose the names of exports, as long and as many as they like: nothing
# is kept for a name that nobody uses any more, and for names whose compressed
# clusters cannot be read there is a limit.

source "$(dirname "$0")/functions.sh"

# The plugin serves this disk under any name.
fresh_image "$work/disk" 1M 16
start_nbdkit names --filter="$FILTER" file "$work/disk" qcowcache-size=4M

# visit FIRST LAST: one client after the other, each with a name of its own; it
# writes some bytes, and the entry of a compressed cluster that nobody has written
visit ()
{
    python "$work/names.sock" "$@" <<'END'
import struct, sys
from nbd_clients import connect
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    client = connect(sys.argv[1], f"{number:04d}" * 1023)
    client.pwrite(b"here", 4 * 65536 + number * 5)
    client.pwrite(struct.pack(">Q", 1 << 62 | 8 * 65536 + number), 2 * 65536)
    client.shutdown()
END
}

resident () { awk '$1 == "VmRSS:" { print $2 }' "/proc/${server_pid[names]}/status"; }

# stays_small FIRST MIDDLE LAST: what is kept, is kept for a limited number of names
stays_small ()
{
    local before after
    visit "$1" "$2"
    before=$(resident)
    visit "$2" "$3"
    after=$(resident)
    echo "resident: $before KiB, and $after KiB after $(($3 - $2)) names more"
    # The names alone are 4 KB each.
    [ $((after - before)) -lt $((($3 - $2) * 2)) ] || fail "memory grows with the number of names"
}

# Reports are for the first 1000 names.
stays_small 0 1100 2600
stop_nbdkit names

# An L1 table with one entry, and the L2 table that it names.
python "$work/disk" <<'END'
import struct, sys
from qcow2 import image_header
with open(sys.argv[1], "r+b") as file:
    file.write(image_header(size=1 << 29, l1=(1, 65536)))
    file.seek(65536)
    file.write(struct.pack(">Q", 1 << 63 | 2 * 65536))
END
# One request at a time, or each client would wait for data that may be late.
start_nbdkit names --filter="$FILTER" --filter=noparallel file "$work/disk" qcowcache-size=4M \
    qcowcache-verify=error qcowcache-readback=true
stays_small 2600 3700 4700
stop_nbdkit names
# Each is told of, and that not all of them are known by name any more.
[ "$(grep -c 'host offset .* never written' "$work/names.err")" -eq 2100 ] ||
    fail "not one message for each cluster that cannot be read"
[ "$(grep -c 'too many exports' "$work/names.err")" -eq 1 ] ||
    fail "nobody says that exports are no longer known by name"
