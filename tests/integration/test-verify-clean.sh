#!/usr/bin/env bash
# With qcowcache-verify=error nothing that qemu writes is ever refused, nothing
# is said, and storage is not read more than without it.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 12M
target=$work/target.qcow2

# start SERVER FILE PARAMETER...: serves FILE, checked
start ()
{
    local name=$1 file=$2
    shift 2
    start_nbdkit "$name" --filter="$FILTER" --filter=log file "$file" logfile="$work/$name.log" \
        qcowcache-verify=error "$@"
}

# stop_clean SERVER WHAT: nothing was reported
stop_clean ()
{
    stop_nbdkit "$1"
    ! grep qcowcache "$work/$1.err" || fail "$2: an alarm for an image that is sound"
}

# reads_of_data IMAGE LOGFILE: how many reads of storage had to do with the image's compressed data
reads_of_data ()
{
    python "$@" <<'END'
import bisect, re, sys
from qcow2 import CompressedClusters
clusters = CompressedClusters(open(sys.argv[1], "rb").read())
streams = []
for entry in clusters.entries.values():
    first = clusters.offset(entry) // 512
    # Without the last sector, where something else may lie behind the stream.
    streams.append((clusters.offset(entry), (first + max(clusters.more_sectors(entry), 1)) * 512))
streams.sort()
assert streams, "nothing in this image is compressed"
ends = [end for _, end in streams]
reads = 0
for line in open(sys.argv[2]):
    found = re.search(r"Read id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", line)
    if found:
        offset, count = (int(number, 16) for number in found.groups())
        if (offset, count) == (0, 4096):
            continue # for the header; with the smallest clusters data lies in the same block
        following = bisect.bisect_right(ends, offset)
        reads += following < len(streams) and streams[following][0] < offset + count
print(reads)
END
}

# converted WHAT CLUSTER TYPE [OPTION...]: converts with and without verify, and compares
converted ()
{
    local what=$1 cluster=$2 type=$3 most_reads=0
    shift 3
    echo "$what: $cluster $type $*"
    fresh_file "$target" 32M
    start_nbdkit plain --filter="$FILTER" --filter=log file "$target" logfile="$work/plain.log"
    convert "$work/source" "$(uri plain)" "$cluster" "$type" "$@"
    stop_nbdkit plain
    fresh_file "$target" 32M
    start server "$target"
    convert "$work/source" "$(uri server)" "$cluster" "$type" "$@" 2>"$work/convert.err"
    stop_clean server "$what"
    [ ! -s "$work/convert.err" ] || fail "$what: qemu-img says: $(cat "$work/convert.err")"
    image_holds "$target" "$work/source"
    # What qemu itself reads again of its tables differs a little with time; the
    # clusters are many times as much, but for large ones, whose tables are as large.
    case $cluster in
        # Large ones also take long to decode: a write that finds all decompressors
        # busy, on a machine that has other work, leaves its cluster to the check.
        128k|256k|512k|1M|2M) most_reads=2 ;;
        *)
            [ "$(count_log "$work/server.log" read-bytes)" -le $(($(count_log "$work/plain.log" read-bytes) + 512 * 1024)) ] ||
                fail "$what: $(count_log "$work/server.log" read-bytes) bytes were read of storage," \
                    "$(count_log "$work/plain.log" read-bytes) without verify"
            ;;
    esac
    [ "$(reads_of_data "$target" "$work/server.log")" -le "$most_reads" ] ||
        fail "$what: $(reads_of_data "$target" "$work/server.log") reads of compressed data"
}

for type in zlib zstd; do
    converted "in order" 64k "$type"
    converted "out of order" 64k "$type" -W -m 16
    converted "extended L2" 64k "$type" -o extended_l2=on
    converted "large clusters" 2M "$type"
done
converted "small clusters" 4k zlib
converted "old format" 64k zlib -o compat=0.10

truncate -s 2M "$work/source"
converted "smallest clusters" 512 zlib -W
type=zlib
for cluster in 512 1k 2k 4k 8k 16k 32k 128k 256k 512k 1M; do
    if [ "$type" = zlib ]; then type=zstd; else type=zlib; fi
    converted "every size" "$cluster" "$type"
done
make_tar_image "$work/source" 12M

echo "a raw copy, front to back and by several connections"
for type in zlib zstd; do
    convert "$work/source" "$work/good.qcow2" 64k "$type"
    for connections in 1 4; do
        fresh_file "$target" "$(stat -c %s "$work/good.qcow2")"
        start server "$target"
        nbdcopy --connections="$connections" --flush "$work/good.qcow2" "$(uri server)"
        stop_clean server "raw copy"
        # Nothing that goes by is a cluster of its own here, so all of them are read.
        [ "$(reads_of_data "$work/good.qcow2" "$work/server.log")" -gt 0 ] || fail "nothing was read to be checked"
        image_holds "$target" "$work/source"
    done
done

echo "through qemu's compress driver"
fresh_file "$target" 32M
start server "$target"
qemu-img create -q -f qcow2 -o cluster_size=64k,compression_type=zstd "$(uri server)" 12M
nbdcopy --flush -- "$work/source" \
    [ qemu-nbd \
    --image-opts "driver=compress,file.driver=qcow2,file.file.driver=nbd,file.file.server.type=unix,file.file.server.path=$work/server.sock" ]
stop_clean server "compress driver"
image_holds "$target" "$work/source"

echo "over a backing file"
qemu-img create -q -f qcow2 -b "$work/source" -F raw "$work/changed.qcow2"
qemu-io -f qcow2 -c "write -q -P 7 1M 2M" -c "write -q -P 9 7M 100k" "$work/changed.qcow2"
for type in zlib zstd; do
    fresh_file "$target" 32M
    start server "$target"
    qemu-img convert -c -t none -f qcow2 -O qcow2 \
        -o "backing_file=$work/source,backing_fmt=raw,compression_type=$type" \
        "$work/changed.qcow2" "$(uri server)" 2>"$work/convert.err"
    stop_clean server "backing file"
    [ ! -s "$work/convert.err" ] || fail "qemu-img says: $(cat "$work/convert.err")"
    qemu-img compare -q -f qcow2 -F qcow2 "$target" "$work/changed.qcow2" || fail "another image than its source"
done

echo "with little memory, with none, and where requests come one at a time"
for parameters in qcowcache-size=1M qcowcache-size=300k qcowcache-size=0 qcowcache-writers=0; do
    fresh_file "$target" 32M
    start server "$target" "$parameters"
    convert "$work/source" "$(uri server)" 64k zlib -W 2>"$work/convert.err"
    stop_clean server "$parameters"
    [ ! -s "$work/convert.err" ] || fail "$parameters: qemu-img says: $(cat "$work/convert.err")"
    image_holds "$target" "$work/source"
done
fresh_file "$target" 32M
start_nbdkit server --filter="$FILTER" --filter=noparallel file "$target" qcowcache-verify=error
convert "$work/source" "$(uri server)" 64k zlib -W
stop_clean server "noparallel"
image_holds "$target" "$work/source"
