#!/usr/bin/env bash
# Room is reserved before a write is acknowledged, in few large pieces.  Nobody
# notices: the file ends up with the same bytes, and takes as much of the disk, as
# without the filter; clients are told of the same holes; and no more is read, or
# written.  After a crash the room that was reserved reads as zeros.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 48M

# convert DISK PARAMETER...
convert ()
{
    local disk=$1
    shift
    fresh_file "$disk" 200M
    start_nbdkit server --filter="$FILTER" file "$disk" qcowcache-stats="$work/stats.json" "$@"
    # shellcheck disable=SC2086  # none, or several options
    qemu-img convert -c -t none $order -f raw -O qcow2 "$work/source" "$(uri server)"
    nbdinfo --map --json "$(uri server)" >"$disk.map"
    stop_nbdkit server
}
count () { jq ".total.$1" "$work/stats.json"; }
used () { du -k "$1" | cut -f1; }

for order in "" "-W -m 16"; do
    convert "$work/without" qcowcache-reserve=0
    [ "$(count reservations)" -eq 0 ] || fail "reserves though it must not"
    reads=$(count fill_up_reads)
    convert "$work/disk"
    # Two connections write: one creates the image.
    windows=$(($(stat -c %s "$work/disk") / 67108864 + 1))
    [ "$(count reservations)" -ge 1 ] || fail "reserves nothing"
    [ "$(count reservations)" -le $((2 * windows)) ] || fail "$(count reservations) reservations"
    [ "$(count refused_reservations)" -eq 0 ] || fail "there was no room"
    [ "$(count fill_up_reads)" -le "$reads" ] || fail "reads what it has reserved"
    [ "$(used "$work/disk")" -le $(($(used "$work/without") * 101 / 100)) ] ||
        fail "takes $(used "$work/disk") KiB of the disk, $(used "$work/without") without reserving"
    image_holds "$work/disk" "$work/source"
    # In order the allocation is the same, too.
    [ -n "$order" ] || cmp "$work/without" "$work/disk"
    [ -n "$order" ] || diff "$work/without.map" "$work/disk.map"
done

# While it is written clients see holes where something is reserved, and after a crash zeros.
fresh_image "$work/disk" 200M 16
start_nbdkit server --filter="$FILTER" file "$work/disk"
nbdsh --base-allocation -u "$(uri server)" -c "
import os, signal
h.pwrite(b'x' * 1000, 70000000)
h.flush()
assert os.stat('$work/disk').st_blocks * 512 > 60 << 20, 'nothing is reserved'
h.pread(4 << 20, 80 << 20)  # so that the page cache has it
found = []
h.block_status(32 << 20, 72 << 20, lambda context, offset, entries, error: found.extend(entries))
assert found == [32 << 20, nbd.STATE_HOLE | nbd.STATE_ZERO], found
os.kill(${server_pid[server]}, signal.SIGKILL)
"
wait "${server_pid[server]}" 2>/dev/null || :
"$PYTHON" -c "
import sys
with open(sys.argv[1], 'rb') as file:
    file.seek(64 << 20)
    data = file.read()
at = 70000000 - (64 << 20)
assert data[at:at + 1000] == b'x' * 1000
assert not any(data[:at]) and not any(data[at + 1000:])
" "$work/disk"
