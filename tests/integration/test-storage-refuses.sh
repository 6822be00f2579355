#!/usr/bin/env bash
# Storage that is full: what was acknowledged stays in memory and can be read,
# flush says why, and when there is room again the next flush stores everything.

source "$(dirname "$0")/functions.sh"

fresh_image "$work/disk" 16M 16
start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" \
    error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
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
