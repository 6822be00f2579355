#!/usr/bin/env bash
# qemu-img convert -c through the filter: for every cluster size, compression and
# order of writing, however many background writers there are and whatever they may
# merge, and on storage with rules of its own, the image that is stored is sound and
# holds the source; written in order it is byte for byte the image that is stored
# without the filter.  Storage receives whole blocks only, once there is a header.

source "$(dirname "$0")/functions.sh"

target=$work/target.qcow2

# stored SOURCE CLUSTER TYPE OPTION... -- NBDKIT-ARGUMENT...: in $target, as another
# client reads it, too
stored ()
{
    local source=$1 cluster=$2 type=$3 options=()
    shift 3
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    fresh_file "$target" 160M
    start_nbdkit server "${@:2}"
    convert "$source" "$(uri server)" "$cluster" "$type" "${options[@]}"
    qemu-img compare -q -f raw -F qcow2 "$source" "$(uri server)" || fail "${*:2}: another client reads another image"
    stop_nbdkit server
    image_holds "$target" "$source"
}

# without SOURCE CLUSTER TYPE: for the next ones, what is stored without the filter
without ()
{
    conversion=("$@")
    stored "$@" -- file "$target"
    mv "$target" "$work/without.qcow2"
}

# converted WHAT NBDKIT-ARGUMENT...: in order and out of order
converted ()
{
    local what="$1, ${conversion[*]:1}"
    shift
    stored "${conversion[@]}" -- --filter="$FILTER" --filter=log "$@" logfile="$work/ordered.log"
    cmp "$target" "$work/without.qcow2" || fail "$what: not the image that is written without the filter"
    stored "${conversion[@]}" -W -m 16 -- --filter="$FILTER" --filter=log "$@" logfile="$work/unordered.log"
    for order in ordered unordered; do
        # Tables of such small clusters come before a header says that it is an image.
        [ "$cluster" = 512 ] || [ "$(count_log "$work/$order.log" odd)" -eq 0 ] || fail "$what: storage received odd writes"
    done
    echo "$what: ok"
}

# Pieces of a tar with a hole behind it, as a disk has.
make_tar_image "$work/large" 28M
truncate -s 32M "$work/large"
make_tar_image "$work/small" 7M
truncate -s 8M "$work/small"
for cluster in 512 4k 64k 2M; do
    source=$work/large
    # Tables of such small clusters make qemu-img slow.
    if [ "$cluster" = 512 ]; then source=$work/small; fi
    for type in zlib zstd; do
        without "$source" "$cluster" "$type"
        converted "a file" file "$target"
    done
done

truncate -s 20M "$work/large"
without "$work/large" 64k zlib
for writers in 0 1 4 16; do
    converted "$writers writers" file "$target" qcowcache-writers=$writers
    converted "$writers writers, little memory, slow storage" --filter=delay file "$target" \
        delay-write=1ms qcowcache-writers=$writers qcowcache-size=1M
done
converted "single units" file "$target" qcowcache-max-write=64K
converted "large merges" --filter=delay file "$target" delay-write=20ms qcowcache-max-write=8M
for model in requests all-requests connections; do
    converted "one at a time: $model" --filter=noparallel file "$target" serialize="$model"
done

without "$work/large" 4k zlib
for minimum in 512 4096 64K; do
    converted "blocks of $minimum" --filter=blocksize-policy file "$target" \
        blocksize-minimum="$minimum" blocksize-preferred=64K blocksize-error-policy=error
done
