#!/usr/bin/env bash
# A disk that runs full while an image is written to it: qemu-img fails, as it does
# without the filter, for a write is acknowledged only when there is room for it.
# So it does with any other error, for what comes after the first write that storage
# refuses is not taken on trust.
#
#   LONG=1   every twentieth of the room that the image needs, on all filesystems

# shellcheck disable=SC2034  # for functions.sh
own_mounts=1
source "$(dirname "$0")/functions.sh"

make_half_random "$work/guest" 320 40000

# convert ORDER COMPRESSION SERVER-ARGUMENT...: leaves its status in $status
convert ()
{
    local order=$1 compression=$2
    shift 2
    status=0
    start_nbdkit server "$@"
    # shellcheck disable=SC2086  # none, or several options
    qemu-img convert -c $order -f raw -O qcow2 -o compression_type="$compression" \
        "$work/guest" "$(uri server)" 2>"$work/convert.err" || status=$?
    stop_nbdkit server
}
# fails ORDER COMPRESSION SERVER-ARGUMENT...: qemu-img does, and says so
fails ()
{
    convert "$@"
    [ "$status" -ne 0 ] || fail "exit status 0: $*: $(cat "$work/convert.err")"
    [ -s "$work/convert.err" ] || fail "fails without a word"
}

# Storage that takes so many writes and then none.
written () { [ "$(count_log "$work/below.log" writes)" -ge "$1" ]; }
for order in "" "-W -m 16"; do
    for writes in 5 50 120; do
        fresh_file "$work/disk" 64M
        rm -f "$work/broken" "$work/below.log"
        touch "$work/below.log"
        (wait_until 60 written "$writes" && touch "$work/broken") &
        fails "$order -r 12M" zlib --filter="$FILTER" --filter=log --filter=error file "$work/disk" \
            logfile="$work/below.log" qcowcache-max-write=64K \
            error-pwrite=EIO error-pwrite-rate=100% error-pwrite-file="$work/broken"
        wait $!
    done
done

if ! small_filesystem "$work/small" 1M; then
    exit 0
fi
unmount "$work/small"

# needs COMPRESSION: KiB of a file that has the image
needs ()
{
    qemu-img convert -c -f raw -O qcow2 -o compression_type="$1" "$work/guest" "$work/image"
    du -k "$work/image" | cut -f1
}
# on_a_loop FILESYSTEM SIZE KIB: a new one of that size with so much room, on $work/small;
# false where there are no loop devices
on_a_loop ()
{
    fresh_file "$work/$1" "$2"
    case $1 in
        ext4) mkfs.ext4 -q -F -m 0 "$work/$1" ;;
        xfs) mkfs.xfs -q -f "$work/$1" ;;
    esac
    mkdir -p "$work/small"
    mount -o loop "$work/$1" "$work/small" || return
    cleanup_fn unmount "$work/small"
    : >"$work/small/disk"
    local free
    free=$(df --output=avail -k "$work/small" | tail -1)
    fallocate -l "$((free - $3))K" "$work/small/filler"
}
ext4 () { on_a_loop ext4 96M "$1"; }
xfs () { on_a_loop xfs 400M "$1"; }
tmpfs () { small_filesystem "$work/small" "${1}k"; }
# full FILESYSTEM KIB ORDER COMPRESSION PLUGIN-ARGUMENT...
full ()
{
    local filesystem=$1 room=$2
    shift 2
    "$filesystem" "$room"
    truncate -s 64M "$work/small/disk"
    [ "$3" != nbd ] || start_o_direct "$work/small/disk"
    fails "$1" "$2" --filter="$FILTER" "${@:3}"
    [ "$3" != nbd ] || stop_nbdkit direct
    unmount "$work/small"
}

requires_program mkfs.ext4 mkfs.xfs
loops=false
if ext4 1024; then
    loops=true
    unmount "$work/small"
else
    echo "no loop devices here: tmpfs only"
fi

for compression in zlib zstd; do
    needed=$(needs "$compression")
    rooms=()
    for part in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19; do
        rooms+=($((needed * part / 20)))
    done
    few=("${rooms[1]}" "${rooms[10]}" "${rooms[18]}")
    for short in 1024 512 256 128 64 16 4; do
        rooms+=($((needed - short)))
    done
    few+=($((needed - 128)) $((needed - 64)) $((needed - 4)))
    [ "${LONG:-}" = 1 ] || rooms=("${few[@]}")
    for order in "" "-W -m 16"; do
        for room in "${rooms[@]}"; do
            full tmpfs "$room" "$order" "$compression" file "$work/small/disk"
            # Its own tables take room as well.
            [ "$compression" = zlib ] || [ "${LONG:-}" = 1 ] || continue
            "$loops" || continue
            for filesystem in ext4 xfs; do
                full "$filesystem" "$room" "$order" "$compression" file "$work/small/disk"
                full "$filesystem" "$room" "$order" "$compression" file "$work/small/disk" cache=none
            done
            full ext4 "$room" "$order" "$compression" nbd socket="$work/direct.sock"
        done
    done
done
