#!/usr/bin/env bash
# A disk that runs full under a backup job with compression, and under nbdcopy into
# qemu-nbd's compress driver: each ends in an error wherever it does so without the
# filter.
#
#   LONG=1   every twentieth of the room that the image needs

# shellcheck disable=SC2034  # for functions.sh
own_mounts=1
source "$(dirname "$0")/functions.sh"

requires_program qemu-storage-daemon
make_half_random "$work/source" 320 40000

# Each writes $work/source to the image behind $work/server.sock.
backup ()
{
    timeout 120 "$PYTHON" "$(dirname "$0")/backup_job.py" "$work/source" "$work/server.sock"
}
pipeline ()
{
    timeout 120 nbdcopy --flush "$work/source" -- \
        [ qemu-nbd --image-opts "driver=compress,file.driver=qcow2,file.file.driver=nbd,file.file.server.type=unix,file.file.server.path=$work/server.sock" ]
}

# writes CLIENT DIRECTORY SERVER-ARGUMENT...: leaves its status in $status
writes ()
{
    local client=$1 disk=$2/disk
    shift 2
    status=0
    truncate -s 0 "$disk"
    truncate -s 64M "$disk"
    start_nbdkit server "$@" file "$disk"
    { qemu-img create -q -f qcow2 "$(uri server)" 20M && "$client"; } >"$work/client.err" 2>&1 || status=$?
    stop_nbdkit server
}

if ! small_filesystem "$work/small" 1M; then
    exit 0
fi
unmount "$work/small"
refused=0
for client in backup pipeline; do
    mkdir -p "$work/large"
    writes "$client" "$work/large"
    [ "$status" -eq 0 ] || fail "$client: $(cat "$work/client.err")"
    needed=$(du -k "$work/large/disk" | cut -f1)
    rooms=($((needed / 10)) $((needed / 2)) $((needed * 9 / 10)) $((needed - 256)) $((needed - 64)) $((needed - 4)))
    if [ "${LONG:-}" = 1 ]; then
        for part in 1 2 3 4 6 7 8 9 11 12 13 14 15 16 17 19; do
            rooms+=($((needed * part / 20)))
        done
    fi
    for room in "${rooms[@]}"; do
        small_filesystem "$work/small" "${room}k"
        writes "$client" "$work/small"
        without=$status
        writes "$client" "$work/small" --filter="$FILTER"
        [ "$status" -ne 0 ] || [ "$without" -eq 0 ] ||
            fail "$client, $room of $needed KiB: success, and status $without without the filter: $(cat "$work/client.err")"
        [ "$without" -eq 0 ] || refused=$((refused + 1))
        unmount "$work/small"
    done
done
echo "$refused failures"
[ "$refused" -ge 8 ] || fail "nothing was ever too small"
