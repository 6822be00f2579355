#!/usr/bin/env bash
# Filters between the client and this one that end connections in ways of
# their own, or ask for more than clients do.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 8M
target=$work/target.qcow2

above=(--filter=exportname --filter=readahead --filter=retry --filter=multi-conn --filter=fua
       --filter=stats --filter=nocache --filter=cache --filter=cow --filter=log)
for filter in "${above[@]}"; do
    parameters=()
    case $filter in
        *=stats) parameters=(statsfile="$work/stats") ;;
        *=log) parameters=(logfile="$work/above.log") ;;
    esac
    fresh_file "$target" 24M
    start_nbdkit server "$filter" --filter="$FILTER" file "$target" "${parameters[@]}"
    convert "$work/source" "$(uri server)" 64k zlib -W -m 16
    case $filter in
        *=cow)
            # Nothing is meant to arrive.
            stop_nbdkit server
            cmp -s -n 4096 "$target" /dev/zero || fail "$filter: something was written"
            ;;
        *)
            qemu-img compare -q -f raw -F qcow2 "$work/source" "$(uri server)" ||
                fail "$filter: another connection reads another image"
            stop_nbdkit server
            image_holds "$target" "$work/source"
            ;;
    esac
done
