#!/usr/bin/env bash
# nbdkit-tmpdisk-plugin makes a disk of its own for each connection, all under
# the same export name: none may see, or receive, another one's bytes.

source "$(dirname "$0")/functions.sh"

# shellcheck disable=SC2016  # the plugin's own shell sets these variables
start_nbdkit server --filter="$FILTER" tmpdisk 8M command='truncate -s $size "$disk"' \
    qcowcache-cluster-size=64k

python "$work/server.sock" <<'END'
import random, sys
from nbd_clients import Client, Model, Ranges, connect

def disk(i):
    """One connection, the first bytes of whose disk are compared."""
    return Client(connect(sys.argv[1]), Model(bytearray(1 << 20)), random.Random(i), f"disk {i}")

clients = [disk(i) for i in range(4)]
ranges = [Ranges(client.dice, 1 << 20) for client in clients]
for step in range(600):
    i = step * 7 % 4
    if step % 50 == 49:
        clients[i].flush()
    else:
        clients[i].request(*ranges[i].some())

# Those who stay notice nothing of those who leave.
while clients:
    clients.pop(0).nbd.shutdown()
    for client in clients:
        client.same(0, 1 << 20, "in the end")
        client.request(0, 1 << 20, "write")
    disk(4).same(0, 1 << 20, "a new disk is empty")
END
stop_nbdkit server

# A whole conversion, read back through the connection that wrote it.
make_tar_image "$work/source" 4M
convert "$work/source" "$work/prepared.qcow2" 64k zlib
# shellcheck disable=SC2016
start_nbdkit server --filter="$FILTER" tmpdisk 8M command='truncate -s $size "$disk"'
run_client server "$work/prepared.qcow2" <<'END'
image = open(arguments[0], "rb").read()
for position in range(0, len(image), 7001):
    client.pwrite(image[position:position + 7001], position)
client.flush()
assert client.pread(len(image), 0) == image
END
stop_nbdkit server
