#!/usr/bin/env bash
# Clients choose the names of exports, as long and as many as they like: nothing
# is kept for a name that nobody uses any more.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

# The plugin serves this disk under any name.
fresh_file "$work/disk" 1M
write_header "$work/disk" 16
start_nbdkit names --filter="$FILTER" file "$work/disk" qcowcache-size=4M

# visit FIRST LAST: one client after the other, each with a name of its own
visit ()
{
    python "$work/names.sock" "$@" <<'END'
import nbd, sys
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    client = nbd.NBD()
    client.set_export_name(f"{number:04d}" * 1023)
    client.connect_unix(sys.argv[1])
    client.pwrite(b"here", 65536 + number * 5)
    client.shutdown()
END
}

resident () { awk '$1 == "VmRSS:" { print $2 }' "/proc/${server_pid[names]}/status"; }

# What is kept for reports is kept for a limited number of names.
visit 0 1100
before=$(resident)
visit 1100 2600
after=$(resident)
echo "resident: $before KiB, and $after KiB after 1500 names more"
# The names alone are 6 MB.
[ $((after - before)) -lt 3072 ] || fail "memory grows with the number of names"
stop_nbdkit names
