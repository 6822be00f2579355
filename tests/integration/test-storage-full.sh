#!/usr/bin/env bash
# A full disk is noticed, and told, but not over and over again: each flush asks
# storage, but does not ask it once more for every unit that it has refused. And
# when there is room again, what was refused is stored even if nobody flushes.

source "$(dirname "$0")/functions.sh"

refusals () { grep -c 'injecting ENOSPC' "$work/server.err" || :; }

# As many units as are held before background writers begin with those that are not full.
units=24
all_stored ()
{
    python "$work/disk" "$units" <<'END'
import sys
from nbd_clients import stored
sys.exit(any(stored(sys.argv[1], i * 131072 + 7, 1000) != bytes([i + 1]) * 1000 for i in range(int(sys.argv[2]))))
END
}

mkfifo "$work/waits" "$work/go-on"
exec 3<>"$work/waits" # so that the client's end is noticed
for writers in 4 0; do
    rm -f "$work/full"
    fresh_file "$work/disk" 32M
    start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" \
        error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full" \
        qcowcache-cluster-size=64K qcowcache-writers="$writers"
    run_client server "$work/full" "$work/waits" "$work/go-on" "$units" <<'END' &
full, waits, go_on, units = arguments
open(full, "w").close()
for i in range(int(units)):
    client.pwrite(bytes([i + 1]) * 1000, i * 131072 + 7)
for _ in range(20):
    assert error_of(client.flush) == "ENOSPC", "a flush succeeded that stored nothing"
with open(waits, "w") as fifo:
    fifo.write("\n")
with open(go_on) as fifo:
    fifo.read()
client.flush()
client.shutdown()
END
    client=$!

    read -r -t 60 -u 3 _ || fail "the client does not get so far"
    told=$(refusals)
    # Once for each flush, once or twice before the first, and one every five seconds.
    if [ "$told" -lt 20 ] || [ "$told" -gt 60 ]; then
        fail "$writers writers: $units units and 20 flushes made storage refuse $told times"
    fi
    rm "$work/full"
    if [ "$writers" -gt 0 ]; then
        wait_until 60 all_stored || fail "refused bytes are not stored though there is room again"
    fi
    echo >"$work/go-on"
    wait "$client"
    all_stored || fail "not stored by a flush that succeeded"
    stop_nbdkit server
    ! grep 'lost' "$work/server.err" || fail "bytes were lost"
done
