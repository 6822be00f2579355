#!/usr/bin/env bash
# nbdkit with the filter under valgrind: no byte is used that was not set or is
# not there any more, and all memory is given back.  Several clients send requests
# of every kind, over storage that refuses some and with background writers or
# without; some of the clients die, and bytes that storage never took are left.
# An image is converted, and a cluster of it damaged, while everything is checked.

source "$(dirname "$0")/functions.sh"

requires_program valgrind
run_nbdkit_under valgrind --quiet --error-exitcode=99 --leak-check=full \
    --show-leak-kinds=definite,possible --errors-for-leak-kinds=definite,possible \
    --keep-debuginfo=yes --num-callers=30 --suppressions="$suppressions/valgrind.supp" \
    --log-file="$work/report.%p"

# The clients: five at a time, each in a 512 KiB of its own.
clients ()
{
    python "$work/server.sock" "$1" <<'END'
import os, random, sys, threading
from nbd_clients import connect, error_of, mixed_requests

def work(number, client, steps):
    # The other tests look at answers.
    mixed_requests(client, random.Random(number), steps, (number + 1) << 19, (number + 2) << 19, refusals=True)

for lives in range(2):
    clients = [connect(sys.argv[1]) for _ in range(5)]
    threads = [threading.Thread(target=work, args=(i, client, 12)) for i, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients[:2]:
        client.shutdown()
    del clients
# Storage takes nothing from here on: what is written now is left behind.
open(sys.argv[2], "w").close()
# Where the memory for what is refused is full already, nothing more is accepted.
accepted = 0
for _ in range(5):
    if accepted:
        break
    last = connect(sys.argv[1])
    # Where the header could not be read nothing is cached.
    accepted = sum(not error_of(lambda: last.pwrite(b"left" * 100, (8 << 20) + i * 70001)) for i in range(20))
os._exit(0)
END
}

for arguments in "file qcowcache-writers=2" "file qcowcache-writers=0 qcowcache-size=4M" \
    "--filter=multi-conn file multi-conn-mode=disable"; do
    read -r -a words <<<"$arguments"
    fresh_image "$work/disk" 10485983 16
    rm -f "$work/full"
    start_nbdkit server --filter="$FILTER" --filter=error "${words[@]}" file="$work/disk" \
        error-pread=EIO error-pread-rate=5% \
        error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
    clients "$work/full"
    stop_nbdkit server
    grep -q 'qcowcache.*lost' "$work/server.err" || fail "nothing was left: $(cat "$work/server.err")"
    echo "$arguments: ok"
done

make_tar_image "$work/source" 1M
fresh_file "$work/disk" 10M
rm -f "$work/full"
start_nbdkit server --filter="$FILTER" --filter=error file "$work/disk" \
    qcowcache-verify=error qcowcache-readback=true \
    error-pread=EIO error-pread-rate=5% error-pread-file="$work/unreadable" \
    error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
for type in zlib zstd; do
    convert "$work/source" "$(uri server)" 64k "$type" -W
done
! grep qcowcache "$work/server.err" || fail "an alarm for a good image"
run_client server <<'END'
clusters = CompressedClusters(client.pread(client.get_size(), 0))
index, entry = next(iter(clusters.entries.items()))
client.pwrite(bytes(8), clusters.l2 + 8 * index)
client.flush()
client.pwrite(b"\xff" * 300, clusters.offset(entry))
client.pwrite(struct.pack(">Q", entry), clusters.l2 + 8 * index)
assert error_of(client.flush), "a damaged cluster is not refused"
client.shutdown()
END
touch "$work/unreadable"
clients "$work/full"
stop_nbdkit server
grep -q 'cannot be read: ' "$work/server.err" || fail "the damaged cluster is not reported"
grep -q 'qcowcache.*lost' "$work/server.err" || fail "nothing was left: $(cat "$work/server.err")"
echo "checked: ok"
