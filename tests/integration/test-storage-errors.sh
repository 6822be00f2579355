#!/usr/bin/env bash
# Storage's own errno reaches the client, whichever request storage refuses, also
# from a plugin that tells it by nbdkit_set_error; and what was acknowledged
# before is there, can be read, and is stored once storage takes it.

source "$(dirname "$0")/functions.sh"

# A plugin that refuses WHAT (for export NAME only: WHAT-NAME) with the errno
# that it finds in a file of that name; the sh plugin sets it by nbdkit_set_error.
cat >"$work/plugin.sh" <<'END'
#!/bin/sh
refuse ()
{
    for what in "$1" "$1-$2"; do
        if [ -e "$STATE/$what" ]; then
            read -r error <"$STATE/$what"
            # nbdkit would report a broken pipe instead.
            [ "$1" != pwrite ] || cat >/dev/null
            echo "$error $1 refused" >&2
            exit 1
        fi
    done
}
case "$1" in
    thread_model) cat "$STATE/model" ;;
    open) echo "$3" ;;
    get_size) echo 16777216 ;;
    can_write | can_flush | can_trim | can_zero | can_fast_zero | can_multi_conn) exit 0 ;;
    pread)
        refuse pread "$2"
        dd if="$STATE/disk-$2" skip="$4" count="$3" iflag=skip_bytes,count_bytes status=none
        ;;
    pwrite)
        refuse pwrite "$2"
        dd of="$STATE/disk-$2" seek="$4" oflag=seek_bytes conv=notrunc status=none
        ;;
    flush) refuse flush "$2" ;;
    trim) refuse trim "$2" ;;
    zero)
        refuse zero "$2"
        head -c "$3" /dev/zero |
            dd of="$STATE/disk-$2" seek="$4" oflag=seek_bytes conv=notrunc status=none
        ;;
    *) exit 2 ;;
esac
END
chmod +x "$work/plugin.sh"
export STATE=$work

# each_errno SERVER
each_errno ()
{
    run_client "$1" "$work" <<'END'
import contextlib
state, = arguments

@contextlib.contextmanager
def refusing(what, name):
    """Storage refuses requests of one kind, with one errno."""
    replace(f"{state}/{what}", name + "\n")
    yield
    os.unlink(f"{state}/{what}")

def expect(name, request, what):
    assert (found := error_of(request)) == name, f"{what}: {found} instead of {name}"

offset = 1 << 20
for name in ("EIO", "ENOSPC", "EPERM", "ENOMEM", "ESHUTDOWN"):
    for what in ("pwrite", "pread"):  # the latter to complete a block
        data = os.urandom(1000)
        client.pwrite(data, offset + 17)
        with refusing(what, name):
            for _ in range(2):
                expect(name, client.flush, f"flush, {what} refused")
                assert client.pread(1000, offset + 17) == data, "acknowledged bytes cannot be read"
        client.flush()
        assert stored(state + "/disk-", offset + 17, 1000) == data, "not stored by the flush that succeeded"
        offset += 65536

    client.pwrite(b"k" * 4096, offset)
    with refusing("pwrite", name):
        expect(name, lambda: client.pwrite(b"fua", offset + 65536, nbd.CMD_FLAG_FUA), "FUA")
    with refusing("flush", name):
        expect(name, lambda: client.pwrite(b"fua", offset + 65536, nbd.CMD_FLAG_FUA), "flush of FUA")
        for _ in range(2):
            expect(name, client.flush, "flush")
    client.flush()

    client.pwrite(b"l" * 4096, offset)
    with refusing("zero", name):
        expect(name, lambda: client.zero(4096, offset), "zero")
        expect(name, lambda: client.zero(4096, offset, nbd.CMD_FLAG_FAST_ZERO), "fast zero")
    with refusing("zero", "ENOTSUP"):
        expect("ENOTSUP", lambda: client.zero(4096, offset, nbd.CMD_FLAG_FAST_ZERO), "fast zero")
    with refusing("trim", name):
        expect(name, lambda: client.trim(4096, offset), "trim")
    with refusing("pread", name):
        assert client.pread(4096, offset) == b"l" * 4096, "dropped by a zero or trim that failed"
        expect(name, lambda: client.pread(4096, 15 << 20), "read")
    client.flush()
    assert stored(state + "/disk-", offset, 4096) == b"l" * 4096
    offset += 3 * 65536

# A zero takes refused bytes away, and with them the refusal.
client.pwrite(b"m" * 4096, offset)
with refusing("pwrite", "EIO"):
    expect("EIO", client.flush, "flush")
    client.zero(4096, offset)
    client.flush()
assert client.pread(4096, offset) == bytes(4096)
client.shutdown()
END
}

for setting in "parallel 4" "parallel 0" "serialize_all_requests 4"; do
    read -r model writers <<<"$setting"
    echo "$model" >"$work/model"
    fresh_file "$work/disk-" 16M
    start_nbdkit server --filter="$FILTER" sh "$work/plugin.sh" qcowcache-cluster-size=64K \
        qcowcache-writers="$writers"
    each_errno server
    stop_nbdkit server
    echo "$setting: ok"
done

echo "memory is full of bytes that one export's storage refuses: the others go on"
echo parallel >"$work/model"
for writers in 4 0; do
    for name in bad good; do
        fresh_file "$work/disk-$name" 16M
    done
    start_nbdkit server --filter="$FILTER" sh "$work/plugin.sh" qcowcache-cluster-size=64K \
        qcowcache-size=1M qcowcache-writers="$writers"
    echo ENOSPC >"$work/pwrite-bad"
    python "$work/server.sock" "$work" <<'END'
import os, sys
from nbd_clients import connect, error_of, stored
address, state = sys.argv[1:]

bad = connect(address, "bad")
taken = []
for i in range(1, 60):
    if error := error_of(lambda: bad.pwrite(bytes([i]) * 700, i * 65536 + 9)):
        assert error == "ENOSPC", error
        break
    taken.append(i)
assert len(taken) in range(4, 20), f"{len(taken)} units in 1 MiB"

good = connect(address, "good")
for i in range(60):
    good.pwrite(bytes([i + 1]) * 700, i * 65536 + 9)
good.flush()
for i in range(60):
    assert stored(state + "/disk-good", i * 65536 + 9, 700) == bytes([i + 1]) * 700

# The client of the full disk goes; the next one finds its bytes, and stores them when it can.
bad.shutdown()
bad = connect(address, "bad")
for i in taken:
    assert bad.pread(700, i * 65536 + 9) == bytes([i]) * 700, f"unit {i}"
assert error_of(bad.flush) == "ENOSPC", "a flush succeeded that stored nothing"
os.unlink(f"{state}/pwrite-bad")
bad.flush()
for i in taken:
    assert stored(state + "/disk-bad", i * 65536 + 9, 700) == bytes([i]) * 700, f"unit {i} is not stored"
END
    stop_nbdkit server
    ! grep 'lost' "$work/server.err" || fail "bytes were lost"
    echo "$writers writers: ok"
done
