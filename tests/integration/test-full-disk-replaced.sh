#!/usr/bin/env bash
# An image meets a full disk, its client gives up, and the image is made again, as
# a new file of the same name and size: nothing of the dead image is read from the
# new file or written into it.  nbdkit says how much of it is lost.  The same file,
# with room again, gets its bytes after all.

# shellcheck disable=SC2034  # for functions.sh
own_mounts=1
source "$(dirname "$0")/functions.sh"

# gives_up SERVER [FULL]: writes an image until storage has refused bytes of it,
# sees a flush fail, and leaves.  FULL, if any, is a file that makes storage full.
# How many writes were acknowledged is in $work/acknowledged then.
gives_up ()
{
    run_client "$1" "$work/acknowledged" "${2:-}" <<'END'
acknowledged, full = arguments
client.pwrite(image_header(), 0)
for step in range(200):
    client.pwrite(b"dead" * 2500, (1 << 20) + step * 10001)
client.flush()
if full:
    open(full, "w").close()
written = 200
# From some point on storage's own answer may be what a write gets.
error = None
while written < 1000 and not (error := error_of(lambda: client.pwrite(b"dead" * 2500, (1 << 20) + written * 10001))):
    written += 1
assert error in (None, "ENOSPC") and error_of(client.flush) == "ENOSPC", "a flush succeeds on a full disk"
with open(acknowledged, "w") as file:
    file.write(str(written))
client.shutdown()
END
}

# finds_nothing SERVER DISK: the next client reads zeros only, and what is stored
# after its flush is what it wrote.
finds_nothing ()
{
    run_client "$1" "$2" "$3" <<'END'
disk, flush_first = arguments
if flush_first == "yes":
    client.flush()
for position in range(0, 16 << 20, 4 << 20):
    assert client.pread(4 << 20, position) == bytes(4 << 20), "reads bytes of the dead image"
client.flush()
client.pwrite(b"living", (1 << 20) + 5)
client.flush()
client.shutdown()
expected = bytearray(16 << 20)
expected[(1 << 20) + 5:(1 << 20) + 11] = b"living"
Model(expected).same(stored(disk, 0, 16 << 20), 0, "the new file has other bytes, of the dead image maybe")
END
}

# says_lost SERVER: one message about the loss
says_lost ()
{
    reported () { grep -q 'qcowcache.*lost [0-9]* bytes' "$work/$1.err"; }
    wait_until 10 reported "$1" || fail "not said that bytes are lost: $(cat "$work/$1.err")"
    [ "$(grep -c 'qcowcache.*lost [0-9]* bytes' "$work/$1.err")" -eq 1 ] || fail "the loss is reported more than once"
}

made_anew () { rm "$1" && truncate -s 16M "$1"; }
copied_over () { truncate -s 16M "$1.new" && mv "$1.new" "$1"; }
emptied () { truncate -s 0 "$1" && truncate -s 16M "$1"; }

for writers in 4 0; do
    for exchange in made_anew copied_over emptied; do
        for flush_first in yes no; do
            echo "$writers writers, $exchange, flush first: $flush_first"
            fresh_file "$work/disk" 16M
            start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" qcowcache-writers="$writers" \
                error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full" qcowcache-size=4M
            gives_up server "$work/full"
            "$exchange" "$work/disk"
            rm "$work/full"
            finds_nothing server "$work/disk" "$flush_first"
            says_lost server
            stop_nbdkit server
        done
    done
done

if small_filesystem "$work/small" 6M; then
    echo "a real one"
    fresh_file "$work/small/disk" 16M
    start_nbdkit server --filter="$FILTER" file "$work/small/disk" qcowcache-reserve=0
    gives_up server
    made_anew "$work/small/disk"
    finds_nothing server "$work/small/disk" no
    says_lost server
    stop_nbdkit server

    echo "the same file, with room again"
    fresh_file "$work/small/disk" 16M
    start_nbdkit server --filter="$FILTER" file "$work/small/disk" qcowcache-reserve=0
    gives_up server
    mount -o remount,size=64M "$work/small"
    run_client server "$work/small/disk" "$(cat "$work/acknowledged")" <<'END'
disk, acknowledged = arguments
for step in range(int(acknowledged)):
    assert client.pread(10000, (1 << 20) + step * 10001) == b"dead" * 2500, f"write {step} is gone"
client.flush()
for step in range(int(acknowledged)):
    assert stored(disk, (1 << 20) + step * 10001, 10000) == b"dead" * 2500, f"write {step} is not stored"
client.shutdown()
END
    stop_nbdkit server
    ! grep 'lost' "$work/server.err" || fail "bytes are lost though there was room again"
fi
