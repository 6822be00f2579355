#!/usr/bin/env bash
# limit=1, above this filter and below it: one client at a time, and a client
# that has gone counts until what it wrote has been handed over to storage.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 1M
qemu-img convert -c -f raw -O qcow2 "$work/source" "$work/image"
truncate -s 4M "$work/image"

client_is_served () { timeout 20 nbdinfo --size "$(uri server)" >/dev/null 2>&1; }
refusals () { grep -c 'limit: too many clients connected' "$work/server.err" || :; }
disconnections () { grep -c ' Disconnect ' "$work/above.log" || :; }
has_more () { [ "$("$1")" -gt "$2" ]; }

# storage p|r: pauses, or resumes
storage ()
{
    python "$work/pause.sock" "$1" <<'END'
import socket, sys
control = socket.socket(socket.AF_UNIX)
control.connect(sys.argv[1])
control.sendall(sys.argv[2].encode())
assert control.recv(1) == sys.argv[2].upper().encode()
END
}

# is_refused: one more client finds no place, and nbdkit says why.
is_refused ()
{
    local before
    before=$(refusals)
    ! client_is_served || fail "limit $position: a client too many is served"
    has_more refusals "$before" || fail "limit $position: nbdkit does not say why"
}

for position in above below; do
    stack=(--filter="$FILTER" --filter=limit)
    if [ "$position" = above ]; then stack=(--filter=limit --filter="$FILTER"); fi
    fresh_file "$work/target" 4M
    start_nbdkit server --filter=log "${stack[@]}" --filter=pause file "$work/target" \
        logfile="$work/above.log" limit=1 pause-control="$work/pause.sock"

    # One client after the other, each with one connection.
    nbdcopy --connections=1 --flush "$work/image" "$(uri server)"
    wait_until 30 client_is_served || fail "limit $position: a second client is not served"
    cmp "$work/target" "$work/image"

    # A client goes, without a flush, while storage does not answer.
    mkfifo "$work/go"
    python "$work/server.sock" "$work/written" "$work/go" <<'END' &
import os, sys
from nbd_clients import connect, error_of, wait_until
clients = []
# The client before may still count.
wait_until(lambda: not error_of(lambda: clients.append(connect(sys.argv[1]))), "a third client is served")
clients[0].pwrite(b"last words", 3000001)
open(sys.argv[2], "w").close()
open(sys.argv[3]).read()
os._exit(0)
END
    wait_until 60 test -e "$work/written" || fail "limit $position: a third client does not write"
    storage p
    # All others have ended: they would have counted.
    ended=$(disconnections)
    : >"$work/go"
    wait_until 30 has_more disconnections "$ended" || fail "nbdkit does not see that the client has gone"
    is_refused
    storage r
    wait_until 30 client_is_served || fail "limit $position: no client is served afterwards"
    stop_nbdkit server
    [ "$(dd if="$work/target" bs=1 skip=3000001 count=10 status=none)" = "last words" ] ||
        fail "limit $position: what the client wrote is not on storage"
    rm "$work/go" "$work/written" "$work/above.log"
done
