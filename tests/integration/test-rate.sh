#!/usr/bin/env bash
# rate above this filter slows the client; below it slows storage, and the client
# only waits where it asks for what is stored.  When nbdkit ends, rate below lets
# nothing through any more, and nbdkit says what is lost.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

make_tar_image "$work/source" 3M

# Who had to wait; nbdkit names the threads of connections, and not the filter's own.
waits () { grep -c ': bucket .*: sleeping for' "$work/server.err" || :; }
client_waits () { grep -c -E '^nbdkit: file[.][0-9]+: debug: bucket .*: sleeping for' "$work/server.err" || :; }
somebody_waits () { [ "$(waits)" -gt 0 ]; }

# More is written at once than rate lets through.
for position in above below; do
    stack=(--filter="$FILTER" --filter=rate)
    if [ "$position" = above ]; then stack=(--filter=rate --filter="$FILTER"); fi
    fresh_file "$work/target" 8M
    start_nbdkit server -v -D rate.bucket=1 "${stack[@]}" file "$work/target" rate=4M burstiness=0.4
    convert "$work/source" "$(uri server)" 64k zlib
    stop_nbdkit server
    image_holds "$work/target" "$work/source"
    echo "rate $position: $(waits) waits, $(client_waits) of them of requests"
    [ "$(waits)" -gt 0 ] || fail "rate $position: nobody had to wait"
    if [ "$position" = above ] && [ "$(client_waits)" -eq 0 ]; then fail "no request had to wait"; fi
done

# Storage that takes a kilobyte a second.  What a client writes is acknowledged all the same.
fresh_file "$work/target" 8M
start_nbdkit server -v -D rate.bucket=1 --filter="$FILTER" --filter=rate --filter=log file "$work/target" \
    rate=8K qcowcache-cluster-size=64k logfile="$work/log"
nbdsh -u "$(uri server)" -c 'for half in 0, 1: h.pwrite(bytes([1]) * (1 << 19), half << 19)' -c 'import os' -c 'os._exit(0)'
[ "$(client_waits)" -eq 0 ] || fail "a client had to wait for storage"
wait_until 30 somebody_waits || fail "storage is not slow"
[ "$(count_log "$work/log" bytes)" -lt $((1 << 20)) ] || fail "storage has everything already"
stop_nbdkit server
grep -q 'aborting sleep because of server shut down' "$work/server.err" || fail "rate still sleeps"
grep -q 'lost [0-9]* bytes that were acknowledged' "$work/server.err" || fail "nbdkit does not report the loss"
