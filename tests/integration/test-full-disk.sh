#!/usr/bin/env bash
# A disk that runs full while an image is written to it: qemu-img fails, as it does
# without the filter, for what comes after the first write that storage refuses is
# not taken on trust.  So it does with any other error.  Only where the room ends
# with what the last flush writes is there nobody left to tell (see LIMIT).

# shellcheck disable=SC2034  # for functions.sh
own_mounts=1
# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

LIMIT=128 # KiB
"$PYTHON" -c "
import random, sys
random.seed(9)
with open(sys.argv[1], 'wb') as file:
    for cluster in range(320):
        file.write(random.randbytes(40000) + bytes((1 << 16) - 40000))
" "$work/guest"
qemu-img convert -c -f raw -O qcow2 "$work/guest" "$work/image"
needed=$(du -k "$work/image" | cut -f1)

# fails ORDER SERVER-ARGUMENT...: qemu-img does, and says so
fails ()
{
    local order=$1 status=0
    shift
    start_nbdkit server --filter="$FILTER" "$@"
    # shellcheck disable=SC2086  # none, or several options
    qemu-img convert -c $order -f raw -O qcow2 "$work/guest" "$(uri server)" 2>"$work/convert.err" || status=$?
    stop_nbdkit server
    [ "$status" -ne 0 ] || fail "exit status 0: $*, order '$order': $(cat "$work/convert.err")"
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
        fails "$order -r 12M" --filter=log --filter=error file "$work/disk" \
            logfile="$work/below.log" qcowcache-max-write=64K \
            error-pwrite=EIO error-pwrite-rate=100% error-pwrite-file="$work/broken"
        wait $!
    done
done

if small_filesystem "$work/small" 1M; then
    unmount "$work/small"
    for order in "" "-W -m 16"; do
        for room in 1 2 5 10 15 18 19 end; do
            if [ "$room" = end ]; then
                room=$((needed - LIMIT))
            else
                room=$((needed * room / 20))
            fi
            small_filesystem "$work/small" "${room}k"
            truncate -s 64M "$work/small/disk"
            fails "$order" file "$work/small/disk"
            unmount "$work/small"
        done
    done
fi
