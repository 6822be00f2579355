#!/usr/bin/env bash
# What the filter says of its work: nothing unless asked, decisions with -v, and
# with -D qcowcache.trace=1 each write and fill-up read as well.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

make_tar_image "$work/source" 16M

# debug_lines: what the filter said in the server that has ended, without what
# nbdkit itself says of each request to it, in $work/lines
debug_lines ()
{
    sed -n -E 's/.*: debug: qcowcache: (export ".*|.* background writers.*|memory for .*)/\1/p' \
        "$work/server.err" >"$work/lines"
}

# conversion NBDKIT-ARGUMENT...
conversion ()
{
    fresh_file "$work/target" 64M
    start_nbdkit server "$@" --filter=log --filter="$FILTER" --filter=stats file "$work/target" \
        logfile="$work/above.log" statsfile="$work/below.stats"
    convert "$work/source" "$(uri server)" 64k zstd
    stop_nbdkit server
    debug_lines
}

# says PATTERN: there is such a line
says () { grep -q -- "$1" "$work/lines" || fail "not said: $1 in: $(tail -n 30 "$work/lines")"; }
how_often () { grep -c -- "$1" "$work/lines" || :; }

echo "by itself it says nothing"
conversion
[ ! -s "$work/server.err" ] || fail "said: $(cat "$work/server.err")"

echo "-v: what it found, and why units were written"
conversion -v
cat "$work/lines"
says 'background writers'
says 'export "": no qcow2 header: passing writes through'
says 'export "": qcow2 header of version 3, clusters of 65536 bytes: caching in units of 65536 bytes'
says 'export "": flush; units written since the last line:.* partial for a flush'
[ "$(how_often 'qcow2 header')" -le 6 ] || fail "a header is said again and again"
[ "$(wc -l <"$work/lines")" -le $(($(count_log "$work/above.log" flushes) + 12)) ] ||
    fail "more than a line for each flush"
[ "$(how_often absorbed)" -eq 0 ] || fail "traces without having been asked"

echo "-D qcowcache.trace=1: every write"
conversion -v -D qcowcache.trace=1
[ "$(how_often 'export "": absorbed ')" -ge $(($(count_log "$work/above.log" writes) - 20)) ] ||
    fail "not every write that was absorbed is traced"
written=$(sed -n 's/^write: \([0-9]*\) ops.*/\1/p' "$work/below.stats")
traced=$(how_often 'export "": writing ')
[ "$traced" -eq "$written" ] || fail "$traced writes to storage were traced, $written were made"

echo "memory that follows a file, and becomes too little"
echo 16M >"$work/size"
fresh_file "$work/target" 16M
write_header "$work/target" 16
start_nbdkit server -v --filter="$FILTER" file "$work/target" qcowcache-size-file="$work/size"
run_client server "$work/size" "$work/server.err" <<'END'
client.pwrite(b"x", 70000)
with open(arguments[0] + ".new", "w") as file:
    file.write("64K")
os.rename(arguments[0] + ".new", arguments[0])
deadline = time.monotonic() + 20
while b"passing writes through" not in open(arguments[1], "rb").read():
    assert time.monotonic() < deadline, "not said that writes pass through"
    client.pwrite(b"x", 70000)
    time.sleep(0.02)
client.shutdown()
END
stop_nbdkit server
debug_lines
says 'memory for cached data is now 65536 bytes'
says '65536 bytes of memory are less than two units of 65536 .*: passing writes through'

echo "storage that refuses: said once for each flush, not for each unit"
fresh_file "$work/target" 16M
write_header "$work/target" 16
start_nbdkit server -v --filter="$FILTER" --filter=error file "$work/target" qcowcache-expire=0 \
    error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
run_client server "$work/full" <<'END'
open(arguments[0], "w").close()
for unit in range(1, 31):
    client.pwrite(b"part", unit * 65536)
try:
    client.flush()
except nbd.Error:
    os.unlink(arguments[0])
client.shutdown()
END
stop_nbdkit server
debug_lines
says 'keeping [0-9]*-[0-9]* in memory: storage refused to write: No space left on device'
says 'flush; units written.* writes refused'
[ "$(how_often 'keeping')" -le 2 ] || fail "said for each unit: $(cat "$work/lines")"
