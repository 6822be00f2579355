#!/usr/bin/env bash
# How much storage sees of a conversion: few writes, whole and aligned, hardly a
# byte more than the image has, and no reads.  B bytes and F flushes are those
# that the same conversion sends; requests are counted by nbdkit's log filter
# below the filter.
#
#   LONG=1    512 MiB of real files
#   SIZE=N    another amount

source "$(dirname "$0")/functions.sh"

if [ "${LONG:-}" = 1 ]; then : "${SIZE:=512M}"; fi
: "${SIZE:=32M}"
make_tar_image "$work/source" "$SIZE"
target=$work/target.qcow2
missed=0

# at_most WHAT FOUND LIMIT
at_most ()
{
    if [ "$2" -gt "$3" ]; then
        echo "    MISSED: $1: $2, limit $3"
        missed=$((missed + 1))
    fi
}

# spare_reads LOGFILE: how many reads are not the one that fills up what a write
# of a partial unit lacks
spare_reads ()
{
    python "$1" <<'END'
import re, sys
request = re.compile(r" (Read|Write) id=\S+ offset=0x(\w+) count=0x(\w+) .*\.\.\.$")
waiting = []
spare = 0
for line in open(sys.argv[1]):
    match = request.search(line)
    if match is None:
        continue
    begin = int(match[2], 16)
    end = begin + int(match[3], 16)
    if match[1] == "Read":
        waiting.append((begin, end))
    else:
        used = [read for read in waiting if begin <= read[0] and read[1] <= end]
        waiting = [read for read in waiting if read not in used]
        spare += max(0, len(used) - 1)
print(spare + len(waiting))
END
}

# measure CLUSTER TYPE ORDER [FILTER-BELOW]
measure ()
{
    local cluster=$1 type=$2 order=$3 below=${4:-} unit=65536
    local options=() sent bytes flushes reads writes
    if [ "$cluster" = 2M ]; then unit=2097152; fi
    if [ "$order" = unordered ]; then options=(-W -m 16); fi

    fresh_file "$target" $((2 * $(stat -c %s "$work/source")))
    start_nbdkit plain --filter=log ${below:+"$below"} file "$target" logfile="$work/plain.log"
    convert "$work/source" "$(uri plain)" "$cluster" "$type" "${options[@]}"
    stop_nbdkit plain
    sent=$(count_log "$work/plain.log" writes)
    bytes=$(count_log "$work/plain.log" bytes)
    flushes=$(count_log "$work/plain.log" flushes)
    reads=$(count_log "$work/plain.log" reads)

    fresh_file "$target" $((2 * $(stat -c %s "$work/source")))
    start_nbdkit filtered --filter="$FILTER" --filter=log ${below:+"$below"} file "$target" \
        logfile="$work/below.log"
    convert "$work/source" "$(uri filtered)" "$cluster" "$type" "${options[@]}"
    stop_nbdkit filtered
    writes=$(count_log "$work/below.log" writes)

    printf '%-4s %-5s %-10s %-10s sent %7d  stored %6d (%6d)  bytes %10d (%10d)  odd %d  reads %d (%d)\n' \
        "$cluster" "$type" "$order" "${below#--filter=}" "$sent" \
        "$writes" $((bytes * 102 / 100 / unit + 4 * flushes)) \
        "$(count_log "$work/below.log" bytes)" $((bytes * 1002 / 1000 + 8192 * flushes)) \
        "$(count_log "$work/below.log" odd)" "$(count_log "$work/below.log" reads)" "$reads"

    at_most writes "$writes" $((bytes * 102 / 100 / unit + 4 * flushes))
    at_most bytes "$(count_log "$work/below.log" bytes)" $((bytes * 1002 / 1000 + 8192 * flushes))
    at_most "writes that do not begin and end on 4096" "$(count_log "$work/below.log" odd)" 0
    if [ "$below" = --filter=noextents ]; then
        # Nothing says what is zero, so each write of a partial unit may be filled up once.
        at_most "reads that fill up nothing" "$(spare_reads "$work/below.log")" "$reads"
    else
        at_most reads "$(count_log "$work/below.log" reads)" "$reads"
    fi
}

for type in zstd zlib; do
    for order in ordered unordered; do
        for cluster in 64k 4k 2M; do
            measure "$cluster" "$type" "$order"
        done
    done
done
measure 64k zstd unordered --filter=noextents
measure 4k zlib ordered --filter=noextents
[ "$missed" -eq 0 ] || fail "$missed figures are missed"
