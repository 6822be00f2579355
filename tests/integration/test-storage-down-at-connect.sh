#!/usr/bin/env bash
# Storage that is down while a client connects, below nbdkit's retry filter: to
# connect asks storage for no byte, and so waits for none of retry's attempts;
# what the client asks for then is answered with an error, and the server, with
# what the clients of other exports have not flushed yet, lives on.

source "$(dirname "$0")/functions.sh"

# While $work/down exists the export "down" can be opened once, and not again
# (retry opens it anew before each attempt), and no byte of it can be read or written.
cat >"$work/storage.sh" <<'END'
down () {
    [ "$1" = down ] && [ -e "$WORK/down" ]
}
refuse () {
    echo refused >>"$WORK/refused"
    echo "EIO storage is down" >&2
    exit 1
}
case "$1" in
    thread_model) echo parallel ;;
    open)
        if down "$3"; then
            [ ! -e "$WORK/opened" ] || refuse
            : >"$WORK/opened"
        fi
        echo "$3"
        ;;
    get_size) echo 4194304 ;;
    can_write | can_flush | can_multi_conn) exit 0 ;;
    flush) ! down "$2" || refuse ;;
    pread)
        ! down "$2" || refuse
        dd if="$WORK/exports/$2" skip="$4" count="$3" iflag=skip_bytes,count_bytes status=none
        ;;
    pwrite)
        ! down "$2" || refuse
        dd of="$WORK/exports/$2" seek="$4" oflag=seek_bytes conv=notrunc status=none bs=1M
        ;;
    *) exit 2 ;;
esac
END
chmod +x "$work/storage.sh"
export WORK=$work
mkdir "$work/exports"

for writers in 4 0; do
    rm -f "$work/down" "$work/opened"
    : >"$work/refused"
    for name in down healthy; do
        fresh_image "$work/exports/$name" 4M 16
    done
    start_nbdkit server --filter="$FILTER" --filter=retry sh "$work/storage.sh" \
        retries=1 retry-delay=1 qcowcache-expire=0 qcowcache-writers="$writers"
    python "$work/server.sock" "$work" <<'END' || fail "$writers writers: see above"
import nbd, os, sys
from nbd_clients import connect, error_of, stored
address, work = sys.argv[1:]

def attempts():
    return stored(f"{work}/refused").count(b"\n")

def refused(request):
    # The second is retry's own, once it could not open storage anew.
    assert (error := error_of(request)) in ("EIO", "ESHUTDOWN"), f"{error} though storage is down"

healthy = connect(address, "healthy")
healthy.pwrite(b"healthy" * 100, 1 << 20)
assert stored(work + "/exports/healthy", 1 << 20, 1) == b"\0", "the test needs bytes that are not flushed"

print("connects while storage is down")
open(f"{work}/down", "w").close()
down = connect(address, "down")
assert attempts() == 0, "connecting waits for retry"
assert down.get_size() == 4 << 20 and not down.is_read_only()

print("and asks for bytes")
refused(lambda: down.pread(512, 8192))
refused(lambda: down.pwrite(b"d" * 512, 8192, nbd.CMD_FLAG_FUA))
refused(down.flush)
assert attempts() > 0, "retry did not try again, so this tests nothing"

print("the other export is as it was")
assert healthy.pread(700, 1 << 20) == b"healthy" * 100
healthy.flush()
assert stored(work + "/exports/healthy", 1 << 20, 700) == b"healthy" * 100

print("another client leaves without asking for anything, while storage is down")
os.unlink(f"{work}/opened")
before = attempts()
onlooker = connect(address, "down")
onlooker.shutdown()
assert attempts() == before, "connecting waits for retry"

print("storage is up again")
os.unlink(f"{work}/down")
down.pwrite(b"d" * 512, 8192)
down.flush()
assert stored(work + "/exports/down", 8192, 512) == b"d" * 512
down.shutdown()
healthy.shutdown()
END
    stop_nbdkit server
done

echo "to connect reads nothing, and the first request does"
fresh_image "$work/disk" 4M 16
start_nbdkit server --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/below.log"
# Without --no-content nbdinfo reads what it shows.
nbdinfo --no-content --json "$(uri server)" >"$work/answers"
nbdinfo --size "$(uri server)" >"$work/answers"
nbdsh -u "$(uri server)" -c 'h.get_size()'
[ "$(count_log "$work/below.log" reads)" -eq 0 ] ||
    fail "connecting reads: $(grep Read "$work/below.log")"
nbdsh -u "$(uri server)" -c 'h.pwrite(b"x" * 100, 1 << 20)'
[ "$(count_log "$work/below.log" reads)" -gt 0 ] || fail "the header is not read with the first write"
stop_nbdkit server
