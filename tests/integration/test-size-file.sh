#!/usr/bin/env bash
# qcowcache-size-file is followed while nbdkit serves: shrinking writes what no
# longer fits, 0 passes everything through, growing takes effect at once, and
# nonsense keeps the last size and is said once.

source "$(dirname "$0")/functions.sh"

fresh_image "$work/disk" 32M 16
echo 16M >"$work/size"
start_nbdkit server --filter="$FILTER" --filter=log file "$work/disk" logfile="$work/below.log" \
    qcowcache-size-file="$work/size" qcowcache-size=1M qcowcache-expire=0
run_client server "$work/size" "$work/disk" "$work/below.log" <<'END'
size, disk, log = arguments

def has_arrived(unit):
    return stored(disk, unit << 16, 4) == b"%04d" % unit

def write(unit):
    client.pwrite(b"%04d" % unit, unit << 16)

# Who has stored something may hold up to half of the memory.
write(300)
client.flush()
for unit in range(1, 81):
    write(unit)
assert not any(has_arrived(unit) for unit in range(1, 81)), "16M of the file were not taken"

replace(size, "2M\n")
wait_until(lambda: sum(map(has_arrived, range(1, 81))) >= 50, "shrinking did not write what no longer fits")

replace(size, "0")
wait_until(lambda: all(map(has_arrived, range(1, 81))), "0 did not drain")
write(200)
assert has_arrived(200), "0 did not pass a write through"

replace(size, "junk")
client.pread(10, 0)
write(201)
replace(size, "16M")
def cached():
    write(202)
    held = stored(disk, 202 << 16, 4) == bytes(4)
    client.trim(65536, 202 << 16)
    return held
wait_until(cached, "growing had no effect")
assert client.pread(4, 80 << 16) == b"0080"
client.shutdown()
END
stop_nbdkit server

fresh_image "$work/disk" 4M 16
echo "not a size" >"$work/size"
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-size-file="$work/size"
for _ in 1 2 3 4 5; do
    nbdsh -u "$(uri server)" -c 'h.pwrite(b"x" * 100, 70000)' -c 'h.flush()'
done
wait_until 10 grep -q "qcowcache-size-file=$work/size" "$work/server.err" || fail "nothing was said of nonsense"
[ "$(grep -c "qcowcache-size-file=$work/size" "$work/server.err")" -eq 1 ] || fail "said more than once"
stop_nbdkit server
