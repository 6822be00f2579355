#!/usr/bin/env bash
# nbdkit-tls-fallback-filter gives clients without TLS another disk under the
# same name.  Above this filter or below it: they see nothing of what a client
# with TLS has written, stored or not.

source "$(dirname "$0")/functions.sh"

requires_program psktool
mkdir -m 700 "$work/keys"
psktool -u friend -p "$work/keys/keys.psk" >/dev/null

# For each order: what the friend writes, in the bytes that the other disk has
# too, stays the friend's, before a flush and after.
for order in above below; do
    fresh_image "$work/disk" 1M 16
    chain=(--filter=tls-fallback --filter="$FILTER")
    [ $order = above ] || chain=(--filter="$FILTER" --filter=tls-fallback)
    start_nbdkit "$order" --tls=on --tls-psk="$work/keys/keys.psk" \
        "${chain[@]}" file "$work/disk" tlsreadme="use TLS"
    python "$work/$order.sock" "$work/keys/keys.psk" <<'END'
import nbd, sys

def connect(with_tls):
    client = nbd.NBD()
    if with_tls:
        client.set_tls(nbd.TLS_REQUIRE)
        client.set_tls_psk_file(sys.argv[2])
        client.set_tls_username("friend")
    client.connect_unix(sys.argv[1])
    return client

notice = b"use TLS".ljust(512, b"\0")

def stranger_sees_the_notice():
    stranger = connect(False)
    assert stranger.get_size() == 512
    assert stranger.is_read_only()
    assert stranger.pread(512, 0) == notice
    return stranger

friend = connect(True)
assert friend.get_tls_negotiated()
assert friend.get_size() == 1 << 20
early = stranger_sees_the_notice()
friend.pwrite(b"secret" * 10, 200)
friend.pwrite(b"secret" * 10000, 100000)
stranger_sees_the_notice()
assert early.pread(512, 0) == notice
assert friend.pread(60, 200) == b"secret" * 10
friend.flush()
stranger_sees_the_notice()
assert early.pread(512, 0) == notice
# A reader that knows nothing of the friend's disk must not teach the cache.
assert friend.pread(4, 0) == b"QFI\xfb"
friend.pwrite(b"more", 300)
friend.shutdown()
stranger_sees_the_notice()
END
    stop_nbdkit "$order"
    [ "$(dd if="$work/disk" bs=1 skip=200 count=6 status=none)" = secret ] || fail "$order: not stored"
    [ "$(dd if="$work/disk" bs=1 skip=300 count=4 status=none)" = more ] || fail "$order: not stored"
    if grep -q -a "use TLS" "$work/disk"; then
        fail "$order: bytes of the other disk were stored"
    fi
done
