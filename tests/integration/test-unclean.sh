#!/usr/bin/env bash
# nbdkit is killed under a client that connects again and goes on, as QEMU does
# with reconnect-delay.  What it had acknowledged and not stored is gone; with
# qcowcache-unclean no flush, and no write to that image, says that all is well
# after that: qemu-img ends with an error, or the image has the right content.
#
#   SEED=N   choose the same moments again (each run prints its seed)
#   LONG=1   ten times as many

source "$(dirname "$0")/functions.sh"

: "${SEED:=$RANDOM}"
echo "seed $SEED"
RANDOM=$SEED
kills=20
[ "${LONG:-}" != 1 ] || kills=200
unclean=$work/unclean

start ()
{
    start_nbdkit server --filter="$FILTER" "$@" file "$work/disk" qcowcache-unclean="$unclean" "${slowly[@]}"
}
# Storage where a conversion takes long enough to be met in the middle.
start_slow ()
{
    slowly=(wdelay=20ms)
    start --filter=delay
}
slowly=()
crash ()
{
    kill -KILL "${server_pid[server]}" 2>/dev/null || : # its client may have done it
    wait "${server_pid[server]}" 2>/dev/null || :
}

# client PYTHON: what a client does, who is connected as h to the export "disk"
client ()
{
    nbdsh -u "$(uri server disk)" -c "
from nbd_clients import error_of
def fails(request):
    return error_of(request) == 'EIO'
$1"
}

fresh_file "$work/disk" 64M
qemu-img create -q -f qcow2 "$work/empty" 32M

# An export is named from its first write to a flush that leaves nothing.
start
[ ! -s "$unclean" ] || fail "named before the first write: $(cat "$unclean")"
client "
h.pwrite(open('$work/empty', 'rb').read(), 0)
h.flush()
assert open('$unclean').read() == ''
h.pwrite(b'x' * 9000, 1000000)
assert '\"disk\"' in open('$unclean').read()
h.pwrite(b'y' * 9000, 1009000)
h.flush()
assert open('$unclean').read() == ''
h.pwrite(b'z' * 9000, 1018000)
"
# The end of a connection is as good, and so is that of the server.
wait_until 10 test ! -s "$unclean" || fail "named when its client has gone: $(cat "$unclean")"
# Also where all has been stored meanwhile, but not flushed.
client "
h.pwrite(b'w' * 65536, 3 << 20)
import time
disk = open('$work/disk', 'rb', buffering=0)
give_up = time.monotonic() + 30
while disk.seek(3 << 20) and disk.read(65536) != b'w' * 65536:
    assert time.monotonic() < give_up, 'nobody writes a whole unit'
assert '\"disk\"' in open('$unclean').read()
"
wait_until 10 test ! -s "$unclean" || fail "named when its client has gone: $(cat "$unclean")"
client "
h.pwrite(b'z' * 9000, 1027000)
import os, signal
os.kill(${server_pid[server]}, signal.SIGTERM)
"
end_of_nbdkit server
[ ! -s "$unclean" ] || fail "named when the server has ended: $(cat "$unclean")"

# A crash.
lose_something ()
{
    start
    client "h.pwrite(b'lost' * 1000, 2000000); import os, signal; os.kill(${server_pid[server]}, signal.SIGKILL)"
    crash
    grep -q '"disk"' "$unclean" || fail "not named after a crash"
}
lose_something
start
client "
assert fails(h.flush)
assert fails(h.flush)
assert fails(lambda: h.pwrite(b'more' * 1000, 2004000))
assert fails(lambda: h.zero(4096, 2008000))
assert fails(lambda: h.trim(4096, 1 << 20))
h.pread(4096, 1000000)
h.pwrite(open('$work/empty', 'rb').read(), 0)  # another image
h.pwrite(b'data' * 1000, 2000000)
h.flush()
"
[ "$(grep -c 'were lost' "$work/server.err")" -eq 1 ] || fail "not one message: $(cat "$work/server.err")"
[ ! -s "$unclean" ] || fail "named although the image is new"
nbdsh -u "$(uri server other)" -c "h.pwrite(b'data' * 1000, 2000000)" -c 'h.flush()'
stop_nbdkit server
for zeros in "h.zero(65536, 0)" "h.pwrite(bytes(65536), 0)"; do
    fresh_file "$work/disk" 64M
    dd if="$work/empty" of="$work/disk" conv=notrunc status=none
    lose_something
    start
    client "$zeros; h.flush()"
    stop_nbdkit server
done
dd if="$work/empty" of="$work/disk" conv=notrunc status=none
lose_something
start
client "assert fails(h.flush)"
sed -i '/"disk"/d' "$unclean"
wait_until 20 client "h.flush()" 2>"$work/refused" || fail "a name that was removed counts: $(cat "$work/refused")"
# Two servers with one file would not know of each other's names.
if nbdkit -f -U "$work/second.sock" --filter="$FILTER" null qcowcache-unclean="$unclean" \
    2>"$work/second.err" </dev/null; then
    fail "two servers have one file"
fi
grep -q 'another server uses it' "$work/second.err" || fail "$(cat "$work/second.err")"
stop_nbdkit server

make_half_random "$work/guest" 256 24576
target="driver=qcow2,file.driver=nbd,file.export=disk,file.server.type=unix"
target+=",file.server.path=$work/server.sock,file.reconnect-delay=60"
convert ()
{
    qemu-img convert -n -c -r 16M "$@" -f raw "$work/guest" --target-image-opts "$target"
}
new_image ()
{
    fresh_file "$work/disk" 64M
    start_slow
    qemu-img create -q -f qcow2 -o "compression_type=$1" "$(uri server disk)" 16M
}

failed=0
for ((i = 0; i < kills; i++)); do
    kind=(zlib zstd)
    order=("" -W)
    new_image "${kind[i % 2]}"
    # shellcheck disable=SC2086  # none, or one option
    convert ${order[i / 2 % 2]} >"$work/convert.err" 2>&1 &
    converts=$!
    sleep "0.$(printf '%03d' $((RANDOM % 900)))"
    crash
    start_slow
    status=0
    wait "$converts" || status=$?
    stop_nbdkit server
    if [ "$status" -ne 0 ]; then
        failed=$((failed + 1))
        [ -s "$work/convert.err" ] || fail "kill $i: qemu-img fails without a word"
    else
        qemu-img compare -f raw -F qcow2 "$work/guest" "$work/disk" ||
            fail "kill $i: convert exits with 0: $(cat "$work/convert.err")"
        [ ! -s "$work/convert.err" ] || fail "kill $i: success, and $(cat "$work/convert.err")"
    fi
done
echo "$failed of $kills conversions failed, the others have the right content"
[ "$failed" -gt 0 ] || fail "nothing was ever lost"
