#!/usr/bin/env bash
# SIGTERM, and clients that die, with a full queue in front of slow storage:
# nbdkit ends, and everything that was acknowledged is in the file.

source "$(dirname "$0")/functions.sh"

# A plugin in shell whose writes are slow because of what they are, not by a
# filter that refuses to sleep once nbdkit is to end.
cat >"$work/slow.sh" <<'END'
case "$1" in
    thread_model) echo parallel ;;
    get_size) echo 33554432 ;;
    can_write | can_flush | can_multi_conn) exit 0 ;;
    flush) exit 0 ;;
    pread) dd if="$DISK" skip="$4" count="$3" iflag=skip_bytes,count_bytes status=none ;;
    pwrite)
        dd of="$DISK" seek="$4" oflag=seek_bytes conv=notrunc status=none bs=1M
        sleep 0.05
        ;;
    *) exit 2 ;;
esac
END
chmod +x "$work/slow.sh"
export DISK=$work/disk

for writers in 0 1 4; do
    fresh_image "$work/disk" 32M 16
    start_nbdkit slow --filter="$FILTER" sh "$work/slow.sh" qcowcache-writers=$writers
    python "$work/slow.sock" "$work/expected" <<'END'
import os, random, sys
from nbd_clients import connect
random.seed(3)
expected = bytearray(8 << 20)
clients = [connect(sys.argv[1]) for _ in range(2)]
for step, offset in enumerate(range(1 << 20, 6 << 20, 30011)):
    data = random.randbytes(30011)
    clients[step % 2].pwrite(data, offset)
    expected[offset:offset + len(data)] = data
with open(sys.argv[2], "wb") as file:
    file.write(expected[1 << 20:6 << 20])
os._exit(0) # no flush, no goodbye
END
    kill -TERM "${server_pid[slow]}"
    end_of_nbdkit slow
    dd if="$work/disk" bs=1M skip=1 count=5 status=none | cmp - "$work/expected" ||
        fail "$writers writers: bytes that were acknowledged are not in the file"
    echo "$writers writers: ok"
done
