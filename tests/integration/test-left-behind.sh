#!/usr/bin/env bash
# A partial unit that nobody comes back to is written after qcowcache-expire
# seconds, without a flush and without a further request; with 0 it is not.

source "$(dirname "$0")/functions.sh"

# has_been_written: the bytes are in the file, seen behind nbdkit's back
has_been_written ()
{
    [ "$(dd if="$work/disk" bs=1 skip=1000000 count=10 status=none | tr -d '\0')" = "some bytes" ]
}

# idle_client EXPIRE COMMAND...: COMMAND runs while a client holds back its flush
idle_client ()
{
    fresh_image "$work/disk" 4M 16
    start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-expire="$1"
    shift
    mkfifo "$work/go-on"
    run_client server "$work/written" "$work/go-on" <<'END' &
client.pwrite(b"some bytes", 1000000)
open(arguments[0], "w").close()
open(arguments[1]).read()
client.shutdown()
END
    local client=$!
    wait_until 30 test -e "$work/written" || fail "the client did not write"
    "$@"
    : >"$work/go-on"
    wait "$client"
    stop_nbdkit server
    has_been_written || fail "lost at the end of the connection"
    rm -f "$work/go-on" "$work/written"
}

written_by_time () { wait_until 20 has_been_written || fail "not written after qcowcache-expire"; }
idle_client 1 written_by_time

# Nothing can be waited for here but time: three times what was enough above.
not_written () { if wait_until 3 has_been_written; then fail "written although qcowcache-expire=0"; fi; }
idle_client 0 not_written
