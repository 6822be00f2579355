#!/usr/bin/env bash
# qemu-img convert -c through the filter: for every cluster size, compression
# and order of writing, the image that is stored is sound and holds the source;
# written in order it is byte for byte the image that is stored without the filter.

source "$(dirname "$0")/functions.sh"

# Pieces of a tar with a hole behind it, as a disk has.
make_tar_image "$work/large" 28M
truncate -s 32M "$work/large"
make_tar_image "$work/small" 7M
truncate -s 8M "$work/small"

target=$work/target.qcow2
for cluster in 512 4k 64k 2M; do
    source=$work/large
    # Tables of such small clusters make qemu-img slow.
    if [ "$cluster" = 512 ]; then source=$work/small; fi

    for type in zlib zstd; do
        fresh_file "$target" 160M
        start_nbdkit plain file "$target"
        convert "$source" "$(uri plain)" "$cluster" "$type"
        stop_nbdkit plain
        mv "$target" "$work/without.qcow2"

        fresh_file "$target" 160M
        start_nbdkit ordered --filter="$FILTER" file "$target"
        convert "$source" "$(uri ordered)" "$cluster" "$type"
        stop_nbdkit ordered
        cmp "$target" "$work/without.qcow2" ||
            fail "$type, $cluster: not the image that is written without the filter"
        image_holds "$target" "$source"

        fresh_file "$target" 160M
        start_nbdkit unordered --filter="$FILTER" file "$target"
        convert "$source" "$(uri unordered)" "$cluster" "$type" -W -m 16
        stop_nbdkit unordered
        image_holds "$target" "$source"
        echo "$type, $cluster: ok"
    done
done
