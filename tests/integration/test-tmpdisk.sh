#!/usr/bin/env bash
# nbdkit-tmpdisk-plugin makes a disk of its own for each connection, all under
# the same export name: none may see, or receive, another one's bytes.

# shellcheck source-path=SCRIPTDIR source=functions.sh
source "$(dirname "$0")/functions.sh"
set -e

# shellcheck disable=SC2016  # the plugin's own shell sets these variables
start_nbdkit server --filter="$FILTER" tmpdisk 8M command='truncate -s $size "$disk"' \
    qcowcache-cluster-size=64k

python "$work/server.sock" <<'END'
import nbd, random, sys

random.seed(1)
clients = []
models = []
for i in range(4):
    client = nbd.NBD()
    client.connect_unix(sys.argv[1])
    clients.append(client)
    models.append(bytearray(client.get_size()))

for step in range(600):
    i = random.randrange(4)
    offset = random.randrange(1 << 20)
    length = random.choice([1, 100, 4096, 5000, 65536, 70000])
    if step % 50 == 49:
        clients[i].flush()
    elif random.random() < 0.7:
        data = bytes([i + 1]) * length
        clients[i].pwrite(data, offset)
        models[i][offset:offset + length] = data
    else:
        found = clients[i].pread(length, offset)
        assert found == models[i][offset:offset + length], f"disk {i} holds other bytes at {offset}"

clients[0].shutdown()
for i in 1, 2, 3:
    assert clients[i].pread(1 << 20, 0) == models[i][:1 << 20], f"disk {i} has changed"

newcomer = nbd.NBD()
newcomer.connect_unix(sys.argv[1])
assert newcomer.pread(1 << 20, 0) == bytes(1 << 20), "a new disk is not empty"
END
stop_nbdkit server

# A whole conversion, read back through the connection that wrote it.
make_tar_image "$work/source" 4M
convert "$work/source" "$work/prepared.qcow2" 64k zlib
# shellcheck disable=SC2016
start_nbdkit server --filter="$FILTER" tmpdisk 8M command='truncate -s $size "$disk"'
python "$work/server.sock" "$work/prepared.qcow2" <<'END'
import nbd, sys
image = open(sys.argv[2], "rb").read()
client = nbd.NBD()
client.connect_unix(sys.argv[1])
for position in range(0, len(image), 7001):
    client.pwrite(image[position:position + 7001], position)
client.flush()
assert client.pread(len(image), 0) == image
END
stop_nbdkit server
