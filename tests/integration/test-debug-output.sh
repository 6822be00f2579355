#!/usr/bin/env bash
# What the filter says of its work: nothing unless asked; with -v its decisions, of
# which there are few, and with -D qcowcache.trace=1 each write as well.  The words
# are a unit test's.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 16M

# How many lines of the filter's own there are.
said () { grep -c 'debug: qcowcache: export "' "$work/server.err" || :; }
count () { jq ".total.$1" "$work/stats.json"; }

# conversion NBDKIT-ARGUMENT...
conversion ()
{
    fresh_file "$work/target" 64M
    start_nbdkit server "$@" --filter="$FILTER" file "$work/target" qcowcache-stats="$work/stats.json"
    convert "$work/source" "$(uri server)" 64k zstd
    stop_nbdkit server
    echo "$*: $(said) lines for $(count client_writes) writes and $(count client_flushes) flushes"
}

conversion
[ ! -s "$work/server.err" ] || fail "said: $(cat "$work/server.err")"

conversion -v
[ "$(said)" -gt 0 ] || fail "says nothing with -v"
[ "$(said)" -le $(($(count client_flushes) + 12)) ] || fail "more than a line for each flush"

conversion -v -D qcowcache.trace=1
[ "$(said)" -ge $(($(count client_writes) + $(count storage_writes) - $(count writes_through))) ] ||
    fail "not every write is traced"

echo "storage that refuses: said once for each flush, not for each unit"
fresh_image "$work/target" 16M 16
start_nbdkit server -v --filter="$FILTER" --filter=error file "$work/target" qcowcache-expire=0 \
    error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
run_client server "$work/full" <<'END'
open(arguments[0], "w").close()
for unit in range(1, 31):
    client.pwrite(b"part", unit * 65536)
assert error_of(client.flush)
os.unlink(arguments[0])
client.shutdown()
END
stop_nbdkit server
[ "$(said)" -gt 0 ] || fail "nothing is said of it"
[ "$(said)" -le 12 ] || fail "said for each unit: $(cat "$work/server.err")"
