#!/usr/bin/env bash
# nbdkit with the filter under valgrind: no byte is used that was not set or is
# not there any more, and all memory is given back.  Several clients send requests
# of every kind, over storage that refuses some and with background writers or
# without; some of the clients die, and bytes that storage never took are left.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

requires_program valgrind
run_nbdkit_under valgrind --quiet --error-exitcode=99 --leak-check=full \
    --show-leak-kinds=definite,possible --errors-for-leak-kinds=definite,possible \
    --keep-debuginfo=yes --num-callers=30 --suppressions="$suppressions/valgrind.supp" \
    --log-file="$work/report.%p"

# The clients: five at a time, each in a 512 KiB of its own.
clients ()
{
    python "$work/server.sock" "$1" <<'END'
import nbd, os, random, sys, threading

def connect():
    client = nbd.NBD()
    client.add_meta_context("base:allocation")
    client.connect_unix(sys.argv[1])
    return client

def work(number, client, steps):
    chosen = random.Random(number)
    first = (number + 1) << 19
    position = first
    for _ in range(steps):
        length = chosen.choice([1, 300, 4096, 9001, 65536, 131072])
        if position + length > first + (1 << 19):
            position = first
        kind = chosen.choice("wwwwwFrrzZtbcf")
        try:
            if kind in "wF":
                client.pwrite(chosen.randbytes(length), position,
                              nbd.CMD_FLAG_FUA if kind == "F" else 0)
            elif kind == "r":
                client.pread(length, position)
            elif kind == "z":
                client.zero(length, position)
            elif kind == "Z":
                client.zero(length, position, nbd.CMD_FLAG_FAST_ZERO)
            elif kind == "t":
                client.trim(length, position)
            elif kind == "b":
                client.block_status(length, position, lambda *ignored: 0)
            elif kind == "c":
                client.cache(length, position)
            else:
                client.flush()
        except nbd.Error:
            pass # the other tests look at answers
        position += length

for lives in range(2):
    clients = [connect() for _ in range(5)]
    threads = [threading.Thread(target=work, args=(i, client, 30)) for i, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients[:2]:
        client.shutdown()
    del clients
# Storage takes nothing from here on: what is written now is left behind.
open(sys.argv[2], "w").close()
last = connect()
for i in range(20):
    last.pwrite(b"left" * 100, (8 << 20) + i * 70001)
os._exit(0)
END
}

for arguments in "file qcowcache-writers=2" "file qcowcache-writers=0 qcowcache-size=4M" \
    "--filter=multi-conn file multi-conn-mode=disable"; do
    read -r -a words <<<"$arguments"
    fresh_file "$work/disk" 10485983
    write_header "$work/disk" 16
    rm -f "$work/full"
    start_nbdkit server --filter="$FILTER" --filter=error "${words[@]}" file="$work/disk" \
        error-pread=EIO error-pread-rate=5% \
        error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$work/full"
    clients "$work/full"
    stop_nbdkit server
    grep -q 'qcowcache.*lost' "$work/server.err" || fail "nothing was left: $(cat "$work/server.err")"
    echo "$arguments: ok"
done
