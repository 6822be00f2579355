#!/usr/bin/env bash
# While storage is slow, full units that lie side by side are written together,
# in writes no larger than qcowcache-max-write.

source "$(dirname "$0")/functions.sh"

# fill MAX-WRITE: 16 MiB in small pieces, much faster than storage takes them
fill ()
{
    fresh_image "$work/disk" 32M 16
    start_nbdkit slow --filter="$FILTER" --filter=log --filter=delay file "$work/disk" \
        logfile="$work/below.log" delay-write=20ms qcowcache-max-write="$1" qcowcache-writers=2
    run_client slow <<'END'
random.seed(1)
for offset in range(1 << 20, 17 << 20, 8192):
    client.pwrite(random.randbytes(8192), offset)
client.flush()
END
    stop_nbdkit slow
    writes=$(count_log "$work/below.log" writes)
    largest=$(sed -n -E 's/.* Write id=.* count=(0x[0-9a-f]+) .*/\1/p' "$work/below.log" |
        while read -r count; do echo $((count)); done | sort -n | tail -n 1)
    echo "qcowcache-max-write=$1: $writes writes, the largest of $largest bytes"
}

fill 64K
[ "$writes" -eq 256 ] || fail "not one write for each unit"
[ "$largest" -eq 65536 ] || fail "a write is larger than allowed"

fill 512K
[ "$writes" -lt 128 ] || fail "hardly anything was merged"
[ "$largest" -le 524288 ] || fail "a write is larger than allowed"
