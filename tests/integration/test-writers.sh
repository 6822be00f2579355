#!/usr/bin/env bash
# The image does not depend on how many background writers there are, nor on
# whether they may be used at all, nor on how much they may merge.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 48M
target=$work/target.qcow2

fresh_file "$target" 96M
start_nbdkit plain file "$target"
convert "$work/source" "$(uri plain)" 64k zlib
stop_nbdkit plain
mv "$target" "$work/without.qcow2"

# converted NAME NBDKIT-ARGUMENT...: in order and out of order
converted ()
{
    local name=$1
    shift
    fresh_file "$target" 96M
    start_nbdkit ordered --filter="$FILTER" "$@"
    convert "$work/source" "$(uri ordered)" 64k zlib
    stop_nbdkit ordered
    cmp "$target" "$work/without.qcow2" || fail "$name: not the image that is written without the filter"

    fresh_file "$target" 96M
    start_nbdkit unordered --filter="$FILTER" "$@"
    convert "$work/source" "$(uri unordered)" 64k zlib -W -m 16
    stop_nbdkit unordered
    image_holds "$target" "$work/source"
    echo "$name: ok"
}

for writers in 0 1 4 16; do
    converted "$writers writers" file "$target" qcowcache-writers=$writers
    converted "$writers writers, little memory, slow storage" --filter=delay file "$target" \
        delay-write=1ms qcowcache-writers=$writers qcowcache-size=1M
done
converted 'a serialised plugin' --filter=noparallel file "$target" qcowcache-writers=4
converted 'single units' file "$target" qcowcache-max-write=64K
converted 'large merges' --filter=delay file "$target" delay-write=20ms qcowcache-max-write=8M
