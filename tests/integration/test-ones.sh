#!/usr/bin/env bash
# 1000 MB of 0x01, where each cluster compresses to some ten bytes: 16 016 writes
# are sent, and at most 24 reach storage.

source "$(dirname "$0")/functions.sh"

tr '\0' '\1' </dev/zero 2>/dev/null | head -c 1048576000 >"$work/ones" || :
[ "$(stat -c %s "$work/ones")" -eq 1048576000 ] || fail "could not make the source"
fresh_file "$work/target" 64M

start_nbdkit server --filter="$FILTER" --filter=log file "$work/target" logfile="$work/below.log"
convert "$work/ones" "$(uri server)" 64k zstd
stop_nbdkit server

image_holds "$work/target" "$work/ones"
writes=$(count_log "$work/below.log" writes)
echo "$writes writes reached storage, $(count_log "$work/below.log" bytes) bytes"
[ "$writes" -le 24 ] || fail "$writes writes reached storage"
[ "$(count_log "$work/below.log" odd)" -eq 0 ] || fail "storage received odd writes"
