#!/usr/bin/env bash
# fio writes blocks of mixed odd sizes with a checksum in each, reads them back
# and verifies them: through the filter onto a file, and onto storage that is
# opened with O_DIRECT.
#
#   SIZE=BYTES   how much each of the jobs writes (16M)

source "$(dirname "$0")/functions.sh"

requires_program fio
: "${SIZE:=16M}"
bytes=$(numfmt --from=iec "$SIZE")

# A disk in memory could not be opened with O_DIRECT, and /tmp may be memory.
disks=$(mktemp -d "${TMPDIR:-/var/tmp}/qcowcache.XXXXXX")
cleanup_fn rm -rf "$disks"
# The parts of the jobs begin at odd offsets and share blocks where they meet;
# the whole is what any storage can have.
part=$((bytes + 777))
total=$(((4 * part + 4096) / 4096 * 4096))

# write_and_verify WHAT: four jobs at once.  The sizes of each job's blocks have one
# odd divisor, the smallest of them: fio puts a header and a checksum into each
# piece of that size.
write_and_verify ()
{
    cat >"$work/jobs.fio" <<END
[global]
ioengine=nbd
uri=$(uri server)
verify=crc32c
verify_fatal=1
verify_state_save=0
do_verify=1
randseed=20
size=$bytes

[append]
offset=$((0 * part))
rw=write
bssplit=601/20:4207/20:26444/40:66110/20
iodepth=1

[append-many-at-once]
offset=$((1 * part))
rw=write
bssplit=513/20:4617/20:26676/40:65151/20
iodepth=16
verify_backlog=100

# Blocks overlap, and the newer one counts: so one at a time.
[anywhere]
offset=$((2 * part))
rw=randwrite
bssplit=513/30:1539/20:9747/30:29241/20
norandommap=1
iodepth=1
fsync=50

[anywhere-with-flushes]
offset=$((3 * part))
rw=randwrite
bssplit=777/30:4662/20:12432/30:69930/20
norandommap=1
iodepth=1
fsync=20
verify_backlog=50
END
    fio --output="$work/fio.out" "$work/jobs.fio" || {
        cat "$work/fio.out" >&2
        fail "$1: fio does not find what it wrote"
    }
}

# reached_storage WHAT GRID: all that fio wrote, in whole blocks.
reached_storage ()
{
    local odd
    [ "$(count_log "$work/below.log" bytes)" -ge $((2 * bytes)) ] || fail "$1: too little reached storage"
    odd=$(count_log "$work/below.log" odd "$2")
    [ "$odd" -eq 0 ] || fail "$1: $odd writes that are not made of blocks of $2"
    [ "$(count_log "$work/below.log" flushes)" -gt 0 ] || fail "$1: no flush"
}

for writers in 0 4; do
    for memory in 512K 16M; do
        what="a file, $writers writers, $memory"
        echo "$what"
        fresh_file "$disks/disk" "$total"
        start_nbdkit server --filter="$FILTER" --filter=log file "$disks/disk" \
            logfile="$work/below.log" qcowcache-cluster-size=64K \
            qcowcache-writers="$writers" qcowcache-size="$memory"
        write_and_verify "$what"
        stop_nbdkit server
        reached_storage "$what" 4096
    done
done

echo "storage opened with O_DIRECT"
fresh_file "$disks/disk" "$total"
start_o_direct "$disks/disk"
start_nbdkit server --filter="$FILTER" --filter=log nbd socket="$work/direct.sock" \
    logfile="$work/below.log" qcowcache-cluster-size=64K qcowcache-size=2M
write_and_verify "O_DIRECT"
stop_nbdkit server
reached_storage "O_DIRECT" 4096
