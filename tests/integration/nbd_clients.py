"""What the clients of the tests have in common: how they connect and look at storage, a model of
what the bytes of a disk may be, and random requests that are compared with it.
"""

import collections
import errno
import os
import random
import struct
import sys
import time

import nbd

from qcow2 import CompressedClusters, image_header

RESERVED = 512  # an image's header: random requests leave it alone
STORAGE_ERRORS = frozenset({errno.EIO, errno.ENOSPC})
MOST_TRIES = 100
KINDS = {"write": 50, "read": 20, "zero": 10, "trim": 8, "extents": 7, "cache": 1}


class Wrong(Exception):
    """The server broke a promise."""


def connect(address, export="", strict=True):
    """A client of the server behind this socket. Not strict: libnbd lets all requests pass."""
    client = nbd.NBD()
    client.add_meta_context("base:allocation")
    client.set_export_name(export)
    if not strict:
        client.set_strict_mode(0)
    client.connect_unix(address)
    return client


def error_of(request):
    """The name of the error that a request ends with, as ENOSPC; None where it succeeds."""
    try:
        request()
    except nbd.Error as error:
        return errno.errorcode.get(error.errnum, str(error))
    return None


def stored(path, offset=0, length=None):
    """These bytes of a file, seen behind the server's back."""
    with open(path, "rb") as file:
        file.seek(offset)
        found = file.read(length)
    if length is not None and len(found) != length:
        raise Wrong(f"{path} ends before {offset + length}")
    return found


def replace(path, text):
    """A file that has this text, and never a part of it."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(path + ".new", path)


def wait_until(condition, what, seconds=30):
    limit = time.monotonic() + seconds * float(os.environ.get("SLOWNESS", 1))
    while not condition():
        if time.monotonic() > limit:
            raise SystemExit(f"{what}: not within {seconds} seconds")
        time.sleep(0.01)


class Change:
    """New bytes, which have come or not; `parts` are where nothing later has replaced them."""

    def __init__(self, begin, data):
        self.begin, self.data = begin, data
        self.parts = [(begin, begin + len(data))]

    def pieces(self, begin, end):
        for first, last in self.parts:
            first, last = max(first, begin), min(last, end)
            if first < last:
                yield first, self.data[first - self.begin:last - self.begin]

    def close(self, begin, end):
        parts = [part for first, last in self.parts
                 for part in ((first, min(last, begin)), (max(end, first), last))]
        self.parts = [(first, last) for first, last in parts if first < last]


class Model:
    """What each byte of a disk may be: as in `held`, which is a bytearray or memory that processes
    share, or as in one of the changes of which nobody knows whether they have come.
    """

    def __init__(self, held):
        self.held = held
        self.changes = []
        self.recent = collections.deque(maxlen=40)  # the latest requests, in words

    def is_(self, begin, data):
        """Whatever was there before."""
        end = begin + len(data)
        self.held[begin:end] = data
        for change in self.changes:
            change.close(begin, end)

    def may_be(self, begin, data):
        """Each byte is as it was before, or new; returns the change."""
        self.changes.append(Change(begin, data))
        return self.changes[-1]

    def has_come(self, change):
        """A change that may have come has done so, and nothing older comes after it."""
        if change not in self.changes:
            return
        for begin, data in change.pieces(0, len(self.held)):
            self.held[begin:begin + len(data)] = data
        for older in self.changes[:self.changes.index(change)]:
            older.close(change.begin, change.begin + len(change.data))
        self.changes.remove(change)

    def wrong(self, found, begin=0, *instead):
        """The offsets of bytes that are not allowed. What is in `instead` is, too."""
        if found == self.held[begin:begin + len(found)]:
            return
        # Mostly all is as it was, or all has come, in each piece.
        for first in range(0, len(found), 512):
            part = found[first:first + 512]
            at, end = begin + first, begin + first + len(part)
            old = self.held[at:end]
            if part == old:
                continue
            others = [other[first:first + 512] for other in instead]
            new = bytearray(old)
            for change in self.changes:
                for where, data in change.pieces(at, end):
                    others.append(bytes(old[:where - at]) + data + bytes(old[where - at + len(data):]))
                    new[where - at:where - at + len(data)] = data
            if part == new or part in others:
                continue
            for i, byte in enumerate(part):
                if byte != old[i] and all(byte != other[i] for other in others):
                    yield at + i

    def same(self, found, begin, what, *instead):
        wrong = list(self.wrong(found, begin, *instead))
        if wrong:
            first = wrong[0]
            raise Wrong("\n  ".join([
                f"{what}: of {begin}-{begin + len(found)} {len(wrong)} bytes are wrong, from {first} to {wrong[-1]};"
                f" the first is {found[first - begin]} and not {self.held[first]}", *self.recent]))

    def seen(self, found, begin, what, *instead):
        """What was allowed, and from now on is so."""
        self.same(found, begin, what, *instead)
        self.is_(begin, found)


class Lane:
    """Every so-many-th stripe of a disk: what one of several clients has to itself, in the blocks
    that it shares with the others.
    """

    def __init__(self, number, count, stripe, size, first=RESERVED):
        self._begins = range(first + number * stripe, size, count * stripe)
        self._stripe, self._size = stripe, size

    def __len__(self):
        return len(self._begins)

    def __getitem__(self, i):
        begin = self._begins[i]
        return begin, min(begin + self._stripe, self._size)

    def some_range(self, dice, number=None):
        """One stripe, which the dice choose if nobody else does, or a part of it."""
        if number is None:
            # The end of the disk has an odd size.
            number = -1 if dice.random() < 0.1 else dice.randrange(len(self))
        begin, end = self[number]
        if dice.random() < 0.5:
            begin = dice.randrange(begin, end)
            end = dice.randrange(begin, end) + 1
        return begin, end


class Ranges:
    """Random ranges of a disk, as image writers and others use it."""

    def __init__(self, dice, size, first=RESERVED):
        self.dice, self.size, self.first = dice, size, first
        self.position = first

    def some(self):
        """On from the range before, beside a border, at the end, or anywhere."""
        dice, size = self.dice, self.size
        length = dice.choice(
            [1, dice.randrange(1, 17), dice.randrange(1, 700), dice.randrange(4090, 4102),
             dice.randrange(1, 30000), dice.randrange(1, 30000), 65536, dice.randrange(1, 150000)])
        where = dice.random()
        if where < 0.45:
            begin = self.position
        elif where < 0.6:
            begin = dice.randrange(size // 65536 + 1) * 65536 + dice.choice([0, 0, -1, -3, 2])
        elif where < 0.7:
            begin = size - length
        else:
            begin = dice.randrange(size)
        if not self.first <= begin < size:
            begin = dice.randrange(self.first, size)
        end = min(begin + length, size)
        self.position = end if end < size else self.first
        return begin, end


def send(client, kind, begin, end, data, answered, flags=0):
    """Begins a request; `answered` gets its errno. What is returned has to live until then."""
    def completion(error):
        answered(error.value)
        return 1

    length = end - begin
    if kind == "read":
        buffer = nbd.Buffer(length)
        client.aio_pread(buffer, begin, completion)
        return buffer
    if kind == "write":
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        client.aio_pwrite(buffer, begin, completion, flags)
        return buffer
    if kind == "extents":
        found = []
        client.aio_block_status(
            length, begin, lambda context, offset, entries, error: found.extend(entries), completion, flags)
        return found
    if kind == "flush":
        client.aio_flush(completion)
    else:
        {"zero": client.aio_zero, "trim": client.aio_trim, "cache": client.aio_cache}[kind](
            length, begin, completion, flags)
    return None


class Request:
    """One request, begun; `finish` waits for its answer and compares it with the model."""

    def __init__(self, client, kind, begin, end):
        self.client, self.kind, self.begin, self.end = client, kind, begin, end
        self.error = None
        self.durable = False
        dice, nbd_client = client.dice, client.nbd
        if not {"trim": nbd_client.can_trim, "cache": nbd_client.can_cache,
                "extents": lambda: nbd_client.can_meta_context("base:allocation")}.get(kind, lambda: True)():
            self.kind = kind = "read"
        flags = 0
        self.data = bytes(end - begin)
        self.may_decline = False
        if kind in ("write", "zero", "trim"):
            self.durable = dice.random() < 0.15
            flags |= nbd.CMD_FLAG_FUA if self.durable else 0
        if kind == "write" and dice.random() < 0.95:
            self.data = dice.randbytes(end - begin)
        elif kind == "zero":
            flags |= dice.choice([0, nbd.CMD_FLAG_NO_HOLE])
            self.may_decline = nbd_client.can_fast_zero() and dice.random() < 0.3
            flags |= nbd.CMD_FLAG_FAST_ZERO if self.may_decline else 0
        elif kind == "extents":
            flags |= dice.choice([0, nbd.CMD_FLAG_REQ_ONE])
        client.model.recent.append(str(self))
        self.answer = send(nbd_client, kind, begin, end, self.data, self._answered, flags)

    def __str__(self):
        fua = ", durable" if self.durable else ""
        return f"{self.client.name}: {self.kind} {self.begin}-{self.end}{fua}"

    def _answered(self, error):
        self.error = error

    def finish(self):
        while self.error is None:
            self.client.nbd.poll(-1)
        if self.may_decline and self.error == errno.ENOTSUP:
            return
        if self.error and self.error not in self.client.refusals:
            raise Wrong(f"{self}: {os.strerror(self.error)}")
        self.client.count(self)
        if self.kind in ("write", "zero", "trim"):
            self._finish_change()
        elif not self.error:
            getattr(self, "_finish_" + self.kind)()

    def _finish_change(self):
        client, model = self.client, self.client.model
        if self.error:
            model.seen(client.read(self.begin, self.end), self.begin, f"{self} that failed", self.data)
        elif self.kind == "trim":
            # They may stay as they were, or as they were stored, or become zeros.
            found = client.read(self.begin, self.end)
            below = [client.stored(self.begin, self.end)] if client.disk else []
            model.seen(found, self.begin, f"{self}, and a read", self.data, *below)
        else:
            model.is_(self.begin, self.data)
            if self.durable and client.disk:
                model.same(client.stored(self.begin, self.end), self.begin, f"{self}, but stored")

    def _finish_read(self):
        self.client.model.same(bytes(self.answer.to_bytearray()), self.begin, str(self))

    def _finish_extents(self):
        offset, size = self.begin, self.client.nbd.get_size()
        for length, state in zip(self.answer[::2], self.answer[1::2]):
            # Behind the range bytes may be somebody else's, who is about to change them.
            end = min(offset + length, size, self.end)
            if state & nbd.STATE_ZERO and offset < end:
                self.client.model.same(bytes(end - offset), offset, f"{self}, said to be zeros")
            offset += length
        if offset <= self.begin:
            raise Wrong(f"{self}: no extents")

    def _finish_cache(self):
        pass


class Client:
    """A connection whose requests are compared with a model.

    `disk` is the file where storage has its bytes; without one nobody looks. `refusals` are the
    errors that storage may answer with.
    """

    kinds = KINDS

    def __init__(self, connection, model, dice, name="client", disk=None, refusals=()):
        self.nbd, self.model, self.dice = connection, model, dice
        self.name, self.refusals = name, refusals
        self.disk = disk and open(disk, "rb", buffering=0)

    def some_kind(self):
        return self.dice.choices(list(self.kinds), list(self.kinds.values()))[0]

    def begin(self, begin, end, kind=None):
        return Request(self, kind or self.some_kind(), begin, end)

    def request(self, begin, end, kind=None):
        self.begin(begin, end, kind).finish()

    def count(self, request):
        """For those who want to know how many requests have been answered."""

    def read(self, begin, end):
        """Whatever it is, and although storage may refuse some of the attempts."""
        for _ in range(MOST_TRIES):
            try:
                return bytes(self.nbd.pread(end - begin, begin))
            except nbd.Error as error:
                if error.errnum not in self.refusals:
                    raise
        raise Wrong(f"{self.name}: {MOST_TRIES} reads in a row failed")

    def stored(self, begin, end):
        return os.pread(self.disk.fileno(), end - begin, begin)

    def same(self, begin, end, what):
        self.model.same(self.read(begin, end), begin, f"{self.name}: {what}")

    def flush(self, *ranges):
        """After it these ranges are stored; false if it was refused."""
        self.model.recent.append(f"{self.name}: flush")
        try:
            self.nbd.flush()
        except nbd.Error as error:
            if error.errnum not in self.refusals:
                raise
            return False
        if self.disk:
            for begin, end in ranges:
                self.model.same(self.stored(begin, end), begin, f"{self.name}: stored after a flush")
        return True


def random_requests(client, steps, first=RESERVED):
    """One after the other, with a flush now and then, and at the end a look at everything."""
    size = len(client.model.held)
    ranges = Ranges(client.dice, size, first)
    for _ in range(steps):
        if client.dice.random() < 0.08:
            client.flush((0, size))
        else:
            client.request(*ranges.some())
    client.flush((0, size))
    client.same(0, size, "read at the end")


def mixed_requests(client, dice, steps, begin, end, refusals=False):
    """Requests of every kind, of sizes that fit nothing. What they are answered nobody looks at."""
    position = begin
    for _ in range(steps):
        length = dice.choice([1, 3, 511, 4096, 7777, 26700, 65536, 130001])
        kind = dice.choice(["write"] * 8 + ["fua", "read", "read", "zero", "durable zero", "trim", "flush"]
                           + ["cache", "extents"] + ["fast zero"] * refusals)
        data = dice.randbytes(length)
        # Mostly appending, as a qcow2 client does.
        if position + length > end:
            position = begin
        where = position if kind in ("write", "fua") else dice.randrange(begin, end - length)
        position += length if kind in ("write", "fua") else 0
        error = error_of({
            "write": lambda: client.pwrite(data, where),
            "fua": lambda: client.pwrite(data, where, nbd.CMD_FLAG_FUA),
            "read": lambda: client.pread(length, where),
            "zero": lambda: client.zero(length, where, nbd.CMD_FLAG_NO_HOLE),
            "fast zero": lambda: client.zero(length, where, nbd.CMD_FLAG_FAST_ZERO),
            "durable zero": lambda: client.zero(length, where, nbd.CMD_FLAG_FUA),
            "trim": lambda: client.trim(length, where),
            "flush": client.flush,
            "cache": lambda: client.cache(length, where),
            "extents": lambda: client.block_status(length, where, lambda *ignored: 0),
        }[kind])
        if error and not refusals:
            raise Wrong(f"{kind} {where}-{where + length}: {error}")


def run():
    """The program on standard input, with what functions.sh says of run_client, and all of the above."""
    address, *arguments = sys.argv[1:]
    names = {**globals(), "address": address, "arguments": arguments, "client": connect(address)}
    try:
        exec(compile(sys.stdin.read(), "client", "exec"), names)
    except Wrong as wrong:
        sys.exit(str(wrong))
