#!/usr/bin/env bash
# Clients that die at every step of the handshake: the server survives, what
# another client has written stays, and the next client is served.

source "$(dirname "$0")/functions.sh"

fresh_file "$work/disk" 8M
start_nbdkit server --filter="$FILTER" file "$work/disk" qcowcache-cluster-size=64k

python "$work/server.sock" <<'END'
import os, socket, struct, sys
from nbd_clients import connect

IHAVEOPT = b"IHAVEOPT"
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7

def option(number, data):
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data

def receive(connection, length):
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        assert more, "the server has closed the connection"
        data += more
    return data

def wait_for_reply_end(connection):
    while True:
        _, _, kind, length = struct.unpack(">QIII", receive(connection, 20))
        receive(connection, length)
        if kind == 1 or kind & 0x80000000:
            return

name_and_no_requests = struct.pack(">I", 0) + struct.pack(">H", 0)
go = option(OPT_GO, name_and_no_requests)

def at_once():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    return connection

def greeted():
    connection = at_once()
    receive(connection, 18)
    connection.sendall(struct.pack(">I", 3))
    return connection

def after_greeting():
    return greeted()

def in_the_middle_of_an_option():
    connection = greeted()
    connection.sendall(go[:13])
    return connection

def after_asking_for_information():
    connection = greeted()
    connection.sendall(option(OPT_INFO, name_and_no_requests))
    wait_for_reply_end(connection)
    return connection

def after_go_unheard():
    connection = greeted()
    connection.sendall(go)
    return connection

def after_go():
    connection = greeted()
    connection.sendall(go)
    wait_for_reply_end(connection)
    return connection

def after_export_name():
    connection = greeted()
    connection.sendall(option(OPT_EXPORT_NAME, b""))
    receive(connection, 10)
    return connection

def in_the_middle_of_a_request():
    connection = after_go()
    connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 4096, 10000)[:20])
    return connection

def in_the_middle_of_a_payload():
    connection = after_go()
    connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 1 << 20, 10000) + b"x" * 5000)
    return connection

survivor = connect(sys.argv[1])
survivor.pwrite(b"here before" * 100, 100001)

deaths = [at_once, after_greeting, in_the_middle_of_an_option, after_asking_for_information,
          after_go_unheard, after_go, after_export_name, in_the_middle_of_a_request,
          in_the_middle_of_a_payload]
for rounds in range(5):
    for death in deaths:
        death().close()
        following = connect(sys.argv[1])
        assert following.pread(1100, 100001) == b"here before" * 100, death.__name__
        following.pwrite(death.__name__.encode(), 3000003)
        following.shutdown()
# Several at once, that nobody closes before the process is gone.
left_open = [death() for death in deaths for _ in range(3)]
assert survivor.pread(1100, 100001) == b"here before" * 100
os._exit(0)
END

stop_nbdkit server
python "$work/disk" <<'END'
import sys
from nbd_clients import stored
assert stored(sys.argv[1], 100001, 1100) == b"here before" * 100
assert stored(sys.argv[1], 3000003, 26) == b"in_the_middle_of_a_payload"
assert stored(sys.argv[1], 1 << 20, 10000) == bytes(10000), "half a request was written"
END
