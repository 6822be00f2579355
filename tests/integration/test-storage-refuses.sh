#!/usr/bin/env bash
# Storage that is full: what was acknowledged stays in memory and can be read,
# flush says why, and when there is room again the next flush stores everything.

source "$(dirname "$0")/functions.sh"

# start SERVER PARAMETER...: $work/disk, full while the file $work/full exists
start ()
{
    local name=$1
    shift
    rm -f "$work/full"
    fresh_image "$work/disk" 16M 16
    start_nbdkit "$name" --filter="$FILTER" --filter=error file "$work/disk" \
        error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full" "$@"
}

start server
run_client server "$work/disk" "$work/full" <<'END'
disk, full = arguments

def refused(request):
    assert (error := error_of(request)) == "ENOSPC", f"{error} instead of ENOSPC"

open(full, "w").close()
print("a write of part of a unit")
client.pwrite(b"part" * 250, (1 << 20) + 17)
for _ in range(3):
    refused(client.flush)
    assert client.pread(1000, (1 << 20) + 17) == b"part" * 250
assert stored(disk, (1 << 20) + 17, 1000) == bytes(1000)

print("another connection reads it, and gets the same answer when it adds to it")
other = connect(address)
assert other.pread(1000, (1 << 20) + 17) == b"part" * 250
refused(lambda: other.pwrite(b"more", (1 << 20) + 1017))
refused(other.flush)
other.shutdown()

print("FUA gets storage's answer")
refused(lambda: client.pwrite(b"fua" * 100, 3 << 20, nbd.CMD_FLAG_FUA))

print("so does all that comes after a refusal, whole units too, and nothing of it is there")
for i in range(8):
    refused(lambda: client.pwrite(bytes([i + 1]) * 65536, (4 << 20) + i * 65536))
assert client.pread(8 * 65536, 4 << 20) == bytes(8 * 65536)

print("reads of what is not cached go on")
assert client.pread(4, 0) == b"QFI\xfb"
assert client.pread(4096, 8 << 20) == bytes(4096)

print("the client leaves, and a later one finds everything")
client.shutdown()
client = connect(address)
assert client.pread(1004, (1 << 20) + 17) == b"part" * 250 + bytes(4)
refused(client.flush)

print("there is room again")
os.unlink(full)
client.flush()
assert stored(disk, (1 << 20) + 17, 1004) == b"part" * 250 + bytes(4)
client.pwrite(b"fine", 5 << 20)
client.flush()
assert stored(disk, 5 << 20, 4) == b"fine"
END
stop_nbdkit server

echo "all memory is held by refused bytes: new writes get storage's answer"
start server qcowcache-size=512K
run_client server "$work/disk" "$work/full" <<'END'
disk, full = arguments
open(full, "w").close()
acknowledged = []
refusals = 0
for i in range(120):
    error = error_of(lambda: client.pwrite(bytes([i + 1]) * 1000, (1 << 20) + i * 65536 + 5))
    assert error in (None, "ENOSPC"), error
    if error:
        refusals += 1
    else:
        acknowledged.append(i)
assert acknowledged, "nothing was cached"
assert refusals, "more was acknowledged than there is memory for"
for i in acknowledged:
    assert client.pread(1000, (1 << 20) + i * 65536 + 5) == bytes([i + 1]) * 1000, f"write {i}"
os.unlink(full)
for i in range(10):
    client.pwrite(b"new", (10 << 20) + i * 65536)
client.flush()
for i in acknowledged:
    assert stored(disk, (1 << 20) + i * 65536 + 5, 1000) == bytes([i + 1]) * 1000, f"write {i} is not stored"
for i in range(10):
    assert stored(disk, (10 << 20) + i * 65536, 3) == b"new"
END
stop_nbdkit server

echo "a zero or trim that fails leaves cached bytes as they are"
rm -f "$work/full"
fresh_file "$work/disk" 16M
start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" qcowcache-cluster-size=64K \
    error=EIO error-zero-rate=100% error-trim-rate=100% \
    error-zero-file="$work/full" error-trim-file="$work/full"
run_client server "$work/disk" "$work/full" <<'END'
client.pwrite(b"k" * 5000, 1 << 20)
client.pwrite(b"l" * 65536, 2 << 20)
open(arguments[1], "w").close()
for request in (lambda: client.zero(1 << 20, 1 << 20), lambda: client.trim(1 << 20, 1 << 20),
                lambda: client.zero(65536, 2 << 20), lambda: client.trim(65536, 2 << 20)):
    assert error_of(request) == "EIO", "a zero or trim succeeded that storage refused"
    assert client.pread(5000, 1 << 20) == b"k" * 5000
    assert client.pread(65536, 2 << 20) == b"l" * 65536
client.flush()
assert stored(arguments[0], 1 << 20, 5000) == b"k" * 5000
assert stored(arguments[0], 2 << 20, 65536) == b"l" * 65536
os.unlink(arguments[1])
client.zero(1 << 20, 1 << 20)
assert client.pread(5000, 1 << 20) == bytes(5000)
END
stop_nbdkit server

echo "the server ends before there is room: it says how much is lost"
start server
run_client server "$work/full" <<'END'
open(arguments[0], "w").close()
client.pwrite(b"gone" * 300, (1 << 20) + 17)
client.pwrite(b"gone" * 300, (5 << 20) + 17)
client.shutdown()
END
stop_nbdkit server
grep -i 'qcowcache.*2400.*\(lost\|not stored\)\|qcowcache.*\(lost\|not stored\).*2400' "$work/server.err" ||
    fail "not said that 2400 bytes are lost: $(cat "$work/server.err")"

echo "connections that share nothing: what storage refuses at the end of one is lost, and reported"
rm -f "$work/full"
fresh_file "$work/disk" 4M
start_nbdkit server --filter="$FILTER" --filter=error --filter=multi-conn file "$work/disk" \
    multi-conn-mode=disable qcowcache-cluster-size=64K \
    error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
run_client server "$work/full" <<'END'
open(arguments[0], "w").close()
client.pwrite(b"gone" * 300, (1 << 20) + 17)
client.shutdown()
END
loss_is_reported () { grep -qi 'qcowcache.*\(lost\|not stored\)' "$work/server.err"; }
wait_until 30 loss_is_reported || fail "not said that bytes are lost: $(cat "$work/server.err")"
rm "$work/full"
run_client server <<'END'
assert client.pread(1200, (1 << 20) + 17) == bytes(1200)
client.pwrite(b"next", (1 << 20) + 17)
client.flush()
END
stop_nbdkit server
[ "$(tail -c +1048594 "$work/disk" | head -c 4)" = next ] || fail "the next connection could not write"
