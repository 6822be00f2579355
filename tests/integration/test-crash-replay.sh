#!/usr/bin/env bash
# The power fails while qemu-img convert -c fills an image through the filter,
# on storage with a volatile cache: all that passed above and beneath the filter
# is recorded, and the power is cut at every point of the record.  Whatever
# storage then keeps of what it has not flushed, all bytes of flushes that were
# acknowledged to qemu are there; and for qemu-img check the image is never
# corrupt, at about 60 of these points of each conversion, evenly spread (2000
# with LONG=1).  Clusters may be leaked: qcow2 allows itself that.
#
# qemu-img convert makes an image and fills it, and flushes nothing before the
# image is made, so half an image may be left without the filter, too.  Here the
# image is made before.  From then on qemu keeps an order by flushes that leaves
# no corruption on such storage, also with many requests in flight; without the
# filter that can be seen with PLAIN=1.
#
#   SEED=N    tear the same writes again (each run prints its seed)
#   LONG=1    larger sources, and qemu-img check at every flush
#   PLAIN=1   without the filter: what storage alone, and qemu, are good for

source "$(dirname "$0")/functions.sh"

tools=${abs_top_builddir:-$(dirname "$FILTER")/../..}/tests
: "${SEED:=$RANDOM}"
echo "seed $SEED"
megabytes=16 most=60
if [ "${LONG:-}" = 1 ]; then megabytes=64 most=2000; fi
filter=(--filter="$FILTER")
if [ "${PLAIN:-}" = 1 ]; then filter=(); fi

# Leaked clusters are 3.
cat >"$work/check.sh" <<'END'
qemu-img check -f qcow2 "$1" >"$1.check" 2>&1
status=$?
[ $status -eq 0 ] || [ $status -eq 3 ] || { tail -n 20 "$1.check" >&2; exit 1; }
END

# fill CLUSTER TYPE OPTION...
fill ()
{
    local cluster=$1 type=$2
    shift 2
    rm -f "$work/image" "$work/journal"
    qemu-img create -q -f qcow2 -o "cluster_size=$cluster,compression_type=$type" "$work/image" "${megabytes}M"
    truncate -s $((megabytes + 10))M "$work/image"
    cp --sparse=always "$work/image" "$work/initial"
    start_nbdkit server --filter="$tools/.libs/journal-above.so" "${filter[@]}" \
        --filter="$tools/.libs/journal-below.so" file "$work/image" \
        journal-above="$work/journal" journal-below="$work/journal"
    qemu-img convert -n -c -t none "$@" -f raw -O qcow2 "$work/source" "$(uri server)"
    stop_nbdkit server
    echo "$cluster, $type${*:+, }$*:"
    "$tools/crash-replay" "$work/journal" "$work/initial" "$SEED" "$work/left" \
        "sh '$work/check.sh' '$work/left'" "$most" || fail "SEED=$SEED may repeat it"
    cmp "$work/left" "$work/image" || fail "the record does not lead to what is stored"
    image_holds "$work/image" "$work/source"
}

make_tar_image "$work/source" "${megabytes}M"
fill 4k zlib
fill 4k zstd -W -m 16
fill 64k zstd
fill 64k zlib -W -m 16
