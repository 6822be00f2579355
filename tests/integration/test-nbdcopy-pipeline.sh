#!/usr/bin/env bash
# nbdcopy into qemu-nbd's compress driver: how tools in the manner of virt-v2v
# compress, with writes that are far more out of order than qemu-img's.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 56M
truncate -s 64M "$work/source"
target=$work/target.qcow2

for type in zlib zstd; do
    fresh_file "$target" 160M
    start_nbdkit server --filter="$FILTER" --filter=log file "$target" logfile="$work/below.log"
    qemu-img create -q -f qcow2 -o "compression_type=$type" "$(uri server)" 64M
    nbdcopy --flush "$work/source" -- \
        [ qemu-nbd --image-opts "driver=compress,file.driver=qcow2,file.file.driver=nbd,file.file.server.type=unix,file.file.server.path=$work/server.sock" ]
    stop_nbdkit server

    image_holds "$target" "$work/source"
    [ "$(count_log "$work/below.log" odd)" -eq 0 ] ||
        fail "$type: $(count_log "$work/below.log" odd) writes do not begin and end on 4096"
done
