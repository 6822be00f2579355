#!/usr/bin/env bash
# Whatever storage is asked, it may fail.  Where it cannot say what it is, there
# is no connection; a request that it refuses is refused with its own error; and
# the next connection and the next request find nothing amiss.

source "$(dirname "$0")/functions.sh"

# What $work/broken names fails.
fresh_image "$work/disk" 2M 16
: >"$work/broken"
broken ()
{
    echo "if [ \"\$(cat $work/broken)\" = $1 ]; then echo ENOSPC broken >&2; exit 1; fi; $2"
}
start_nbdkit server --filter="$FILTER" eval thread_model="echo parallel" \
    get_size="$(broken get_size "echo 2097152")" \
    block_size="$(broken block_size "echo 1 4096 33554432")" \
    can_write="$(broken can_write "exit 0")" \
    can_flush="$(broken can_flush "exit 0")" \
    can_trim="$(broken can_trim "exit 0")" \
    can_zero="$(broken can_zero "exit 0")" \
    can_fast_zero="$(broken can_fast_zero "exit 0")" \
    can_extents="$(broken can_extents "exit 0")" \
    can_cache="$(broken can_cache "echo native")" \
    can_fua="$(broken can_fua "echo native")" \
    can_multi_conn="$(broken can_multi_conn "exit 0")" \
    pread="$(broken pread "dd if=$work/disk iflag=skip_bytes,count_bytes skip=\$4 count=\$3 status=none")" \
    pwrite="$(broken pwrite "dd of=$work/disk oflag=seek_bytes seek=\$4 conv=notrunc status=none")" \
    flush="$(broken flush "exit 0")" \
    trim="$(broken trim "exit 0")" \
    zero="$(broken zero "dd if=/dev/zero of=$work/disk oflag=seek_bytes iflag=count_bytes seek=\$4 count=\$3 \
        conv=notrunc status=none")" \
    extents="$(broken extents "echo \$4 \$3")" \
    cache="$(broken cache "exit 0")"

python "$work/server.sock" "$work/disk" "$work/broken" <<'END'
import nbd, sys
from nbd_clients import connect, error_of, stored
address, disk, broken = sys.argv[1:]

def break_down(what):
    with open(broken, "w") as file:
        file.write(what)

for what in ("get_size", "block_size", "can_write", "can_flush", "can_trim", "can_zero", "can_fast_zero",
             "can_extents", "can_cache", "can_fua", "can_multi_conn"):
    break_down(what)
    # Of its block sizes storage need not tell.
    assert bool(error_of(lambda: connect(address))) == (what != "block_size"), f"a connection without {what}"
    break_down("")
    client = connect(address)
    client.pwrite(what.encode(), 70000)
    client.flush()
    assert stored(disk, 70000, len(what)) == what.encode()
    client.shutdown()

client = connect(address)
client.pwrite(b"before" * 100, 600001)
requests = {
    "pread": lambda: client.pread(1000, 1 << 20),
    "pwrite": lambda: client.pwrite(b"x" * 1000, 1 << 20, nbd.CMD_FLAG_FUA),
    "flush": client.flush,
    "trim": lambda: client.trim(65536, 1 << 20),
    "zero": lambda: client.zero(65536, 1 << 20),
    "extents": lambda: client.block_status(65536, 1 << 20, lambda *ignored: 0),
    "cache": lambda: client.cache(65536, 1 << 20),
}
for what, request in requests.items():
    break_down(what)
    assert (error := error_of(request)) == "ENOSPC", f"{what}: {error} instead of ENOSPC"
    break_down("")
    request()
assert client.pread(600, 600001) == b"before" * 100
client.flush()
assert stored(disk, 600001, 600) == b"before" * 100
client.shutdown()

# While the header cannot be read nothing is held.
break_down("pread")
client = connect(address, "unread")
client.pwrite(b"first", 800101)
break_down("")
assert stored(disk, 800101, 5) == b"first", "a write was held back without a header"
client.pwrite(b"held", 800001)
assert stored(disk, 800001, 4) != b"held", "the header is not looked for again"
client.shutdown()
END
stop_nbdkit server

# More is lost at the end than fits into a line: the first pieces are named, the others counted.
fresh_file "$work/disk" 16M
start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" qcowcache-cluster-size=64K \
    error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
run_client server "$work/full" <<'END'
open(arguments[0], "w").close()
for i in range(7):
    client.pwrite(b"lost", (i + 1) << 20)
client.shutdown()
END
stop_nbdkit server
grep 'lost 28 bytes.*: 1048576-1048579, 2097152-2097155, 3145728-3145731, 4194304-4194307, and 3 more$' \
    "$work/server.err" || fail "not said what is lost: $(cat "$work/server.err")"
