#!/usr/bin/env bash
# The man page's examples with storage on this machine, run as they stand there:
# files, a block device, memory, O_DIRECT, several exports, memory that changes.
# Each that writes leaves an image that is sound and holds the disk, read without
# the filter; and ends with a failure where there is no room for one.

# shellcheck disable=SC2034  # for functions.sh
own_mounts=1
source "$(dirname "$0")/functions.sh"
source "$(dirname "$0")/examples.sh"

at_example
run_example "A local file, in one command"
holds disk.qcow2
[ "$(stat -c %s "$here/disk.qcow2")" -lt 268435456 ] || fail "the file was not cut"
fails "A local file, in one command"

at_example
run_example "A local file, through a server"
holds disk.qcow2
fails "A local file, through a server"

# Another device for what fails, which is too small.
truncate -s 4M "$work/small-device"
changes=(-e "s|/dev/backup/disk|$work/small-device|g")
at_example
in_vain "A block device"
changes=()

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

keep=("${places[@]}")
places+=(-e "s|/dev/shm/|$here/|g")
fails "A file in memory (tmpfs)"
places=("${keep[@]}")

# As above: a root of its own may have no /dev/shm.
at_example
if [ "$(stat -f -c %T /dev/shm 2>/dev/null)" = tmpfs ]; then
    shm=$(mktemp -d /dev/shm/qcowcache.XXXXXX)
    cleanup_fn rm -rf "$shm"
else
    echo "no tmpfs here: a directory stands for it"
    shm=$here
fi
places+=(-e "s|/dev/shm/|$shm/|g")
run_example "A file in memory (tmpfs)"
image_holds "$shm/disk.qcow2" "$work/source"

at_example
run_example "O_DIRECT, through qemu-nbd"
holds disk.qcow2
fails "O_DIRECT, through qemu-nbd"

at_example
run_example "Several images at once"
holds exports/first.qcow2 exports/second.qcow2
fails "Several images at once"

at_example
run_example "More memory while nbdkit runs"
holds disk.qcow2
fails "More memory while nbdkit runs"

at_example
run_example "nbdcopy"
holds disk.qcow2
fails "nbdcopy" zstd

at_example
run_example "A pipeline in the manner of virt-v2v"
holds disk.qcow2
fails "A pipeline in the manner of virt-v2v"

# What is further down on the page starts a server and no more.
backup () { echo "nbd+unix:///$1?socket=$here/backup.sock"; }

end_backup ()
{
    kill "$(cat "$here/backup.pid")"
    tail --pid="$(cat "$here/backup.pid")" -s 0.1 -f /dev/null
}

# refused EXPORT: the server has no such export, in the words of README
refused ()
{
    if nbdsh -u "$(backup "$1")" -c 'h.flush()' >"$work/refused" 2>&1; then
        fail "there is an export '$1'"
    fi
    grep -q "server has no export named '$1'" "$work/refused" || fail "not refused: $(cat "$work/refused")"
}

at_example
truncate -s 64M "$here/disk.qcow2"
run_example "One disk, one name"
convert "$work/source" "$(backup disk)" 64k zstd
refused ""
refused other
end_backup
holds disk.qcow2

at_example
mkdir "$here/exports" "$here/collected"
truncate -s 64M "$here/exports/disk.qcow2"
places+=(-e "s|/var/lib/prometheus/node-exporter|$here/collected|")
example "STATISTICS" | paragraph 1 | run_here
# There is a report before anybody is served.
wait_until 30 grep -q -s '^qcowcache_memory_limit_bytes{server="backup"} 67108864$' "$here/collected/backup.prom" ||
    fail "no report"
convert "$work/source" "$(backup disk.qcow2)" 64k zstd
end_backup
holds exports/disk.qcow2
grep -q '^qcowcache_lost_bytes_total{server="backup",export="disk.qcow2"} 0$' "$here/collected/backup.prom" ||
    fail "not in the last report: $(cat "$here/collected/backup.prom")"
# What the page's queries ask for.
example "STATISTICS" | paragraph 2 | grep -o 'qcowcache_[a-z_]*_total' >"$work/asked-for"
while read -r name; do
    grep -q "^$name{" "$here/collected/backup.prom" || fail "there is no $name"
done <"$work/asked-for"
