#!/usr/bin/env bash
# Storage that serves one request at a time, or one client at a time.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 24M
target=$work/target.qcow2

for model in requests all-requests connections; do
    for order in "" "-W -m 16"; do
        read -r -a options <<<"$order"
        fresh_file "$target" 48M
        start_nbdkit server --filter="$FILTER" --filter=noparallel --filter=log file "$target" \
            serialize="$model" logfile="$work/below.log"
        convert "$work/source" "$(uri server)" 64k zstd "${options[@]}"
        qemu-img compare -q -f raw -F qcow2 "$work/source" "$(uri server)" ||
            fail "$model: a second client reads another image"
        stop_nbdkit server
        image_holds "$target" "$work/source"
        [ "$(count_log "$work/below.log" odd)" -eq 0 ] || fail "$model: storage received odd writes"
    done
done

# A client that goes without a flush is served by the same locks.
for model in requests all-requests connections; do
    fresh_file "$target" 48M
    start_nbdkit server --filter="$FILTER" --filter=noparallel file "$target" serialize="$model" \
        qcowcache-cluster-size=64k
    run_client server <<'END'
for i in range(40):
    client.pwrite(bytes([i + 1]) * 4001, i * 150001)
os._exit(0)
END
    stop_nbdkit server
    python "$target" <<'END'
import sys
from nbd_clients import stored
for i in range(40):
    assert stored(sys.argv[1], i * 150001, 4001) == bytes([i + 1]) * 4001, f"write {i} is not stored"
END
done
