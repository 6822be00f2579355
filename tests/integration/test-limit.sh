#!/usr/bin/env bash
# limit=1, above this filter and below it: one client at a time, and a client
# that has gone counts until what it wrote has been handed over to storage.

source "$(dirname "$0")/functions.sh"

make_tar_image "$work/source" 1M
qemu-img convert -c -f raw -O qcow2 "$work/source" "$work/image"
truncate -s 4M "$work/image"

client_is_served () { timeout 20 nbdinfo --size "$(uri server)" >/dev/null 2>&1; }
count () { grep -c "$1" "$work/server.err" || :; }
has_more () { [ "$(count "$1")" -gt "$2" ]; }

# is_refused: one more client finds no place, and nbdkit says why.
is_refused ()
{
    local before
    before=$(count 'limit: too many clients connected')
    ! client_is_served || fail "limit $position: a client too many is served"
    has_more 'limit: too many clients connected' "$before" || fail "limit $position: nbdkit does not say why"
}

for position in above below; do
    stack=(--filter="$FILTER" --filter=limit)
    if [ "$position" = above ]; then stack=(--filter=limit --filter="$FILTER"); fi
    fresh_file "$work/target" 4M
    start_nbdkit server -v "${stack[@]}" --filter=pause file "$work/target" \
        limit=1 pause-control="$work/pause.sock"

    # One client after the other, each with one connection.
    nbdcopy --connections=1 --flush "$work/image" "$(uri server)"
    wait_until 30 client_is_served || fail "limit $position: a second client is not served"
    cmp "$work/target" "$work/image"

    # A client goes, without a flush, while storage does not answer.
    ended=$(python "$work/server.sock" "$work/pause.sock" "$work/server.err" <<'END'
import nbd, os, socket, sys, time

# The client before may still count.
limit = time.monotonic() + 30
while True:
    client = nbd.NBD()
    try:
        client.connect_unix(sys.argv[1])
        break
    except nbd.Error:
        assert time.monotonic() < limit
        time.sleep(0.02)

client.pwrite(b"last words", 3000001)
control = socket.socket(socket.AF_UNIX)
control.connect(sys.argv[2])
control.sendall(b"p")
assert control.recv(1) == b"P"
# All others have ended: they would have counted.
print(open(sys.argv[3]).read().count("qcowcache: finalize"), flush=True)
os._exit(0)
END
    )
    wait_until 30 has_more 'qcowcache: finalize' "$ended" || fail "nbdkit does not see that the client has gone"
    is_refused

    python "$work/pause.sock" <<'END'
import socket, sys
control = socket.socket(socket.AF_UNIX)
control.connect(sys.argv[1])
control.sendall(b"r")
assert control.recv(1) == b"R"
END
    wait_until 30 client_is_served || fail "limit $position: no client is served afterwards"
    stop_nbdkit server
    [ "$(dd if="$work/target" bs=1 skip=3000001 count=10 status=none)" = "last words" ] ||
        fail "limit $position: what the client wrote is not on storage"
done
