#!/usr/bin/env bash
# The man page's examples with storage on this machine, run as they stand there:
# files, a block device, O_DIRECT, several exports, memory that changes.  Each
# leaves an image that is sound and holds the disk, read without the filter.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
# shellcheck source-path=SCRIPTDIR source=examples.sh
source "$(dirname "$0")/examples.sh"
set -e

at_example
run_example "A local file, in one command"
holds disk.qcow2
[ "$(stat -c %s "$here/disk.qcow2")" -lt 268435456 ] || fail "the file was not cut"

at_example
run_example "A local file, through a server"
holds disk.qcow2

# A loop device, or a file where the machine has none to give: a container's.
at_example
truncate -s 128M "$work/device"
device=$(losetup --find --show "$work/device" 2>/dev/null) || device=
if [ -n "$device" ]; then
    cleanup_fn losetup --detach "$device"
else
    echo "no loop device here: a file stands for the block device"
    device=$work/device
fi
places+=(-e "s|/dev/backup/disk|$device|g")
run_example "A block device"
image_holds "$device" "$work/source"

at_example
run_example "O_DIRECT, through qemu-nbd"
holds disk.qcow2

at_example
run_example "Several images at once"
holds exports/first.qcow2 exports/second.qcow2

at_example
run_example "More memory while nbdkit runs"
holds disk.qcow2

at_example
run_example "nbdcopy"
holds disk.qcow2

at_example
run_example "A pipeline in the manner of virt-v2v"
holds disk.qcow2
