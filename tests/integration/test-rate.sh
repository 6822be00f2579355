#!/usr/bin/env bash
# rate below this filter slows storage, and the client only waits where it asks for
# what is stored.  When nbdkit ends, rate lets nothing through any more, and nbdkit
# says what is lost.  (An image that is written at some rate: see test-stacking.sh.)

source "$(dirname "$0")/functions.sh"

# Storage that takes a kilobyte a second.  What a client writes is acknowledged all the same.
fresh_file "$work/target" 8M
start_nbdkit server --filter="$FILTER" --filter=rate --filter=log file "$work/target" \
    rate=8K qcowcache-cluster-size=64k logfile="$work/log"
nbdsh -u "$(uri server)" -c 'for half in 0, 1: h.pwrite(bytes([1]) * (1 << 19), half << 19)' -c 'import os' -c 'os._exit(0)'
[ "$(count_log "$work/log" bytes)" -lt $((1 << 20)) ] || fail "the client had to wait for storage, or storage is not slow"
stop_nbdkit server
grep -q 'lost [0-9]* bytes that were acknowledged' "$work/server.err" || fail "nbdkit does not report the loss"
