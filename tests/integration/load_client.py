"""The clients of test-load.sh: many connections to several exports at once, half of which die.

    load_client.py --server PID --socket ADDRESS --directory DIR --seed N [OPTION...]

Every client is a process of its own and has a lane of its export to itself: every so-many-th
stripe of it, so that all lanes meet in the same blocks and units. What each byte has to be is in
memory that the processes share, so that it outlives them. A round ends when each lane has been
used once; then the server has to have noticed that everybody is gone, and every byte is compared,
first as the server reads it and, after a flush, as it is in the file.

Requests may fail with what storage's errors are, and never with anything else. One that failed may
have changed its bytes or not; from then on they stay what a read says they are. A client that dies
leaves at most one request without an answer (see test-load.sh); its bytes are settled in the same
way when the round ends.
"""

import argparse
import collections
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import traceback

import nbd

RESERVED = 512  # the image's header
LANES_PER_CONNECTION = 3
LEAST_ROUNDS = 6
MOST_AT_ONCE = 6
STRIPES = (61, 700, 1024, 3000, 20000, 65536, 200000)
STORAGE_ERRORS = {errno.EIO, errno.ENOSPC}
MOST_TRIES = 100
MOST_READ = 1 << 19

# What a client tells the others, one number each.
FIELDS = ("busy_since", "requests", "refusals", "flushes", "pending_begin", "pending_end")


class Failure(Exception):
    """The server broke a promise."""


class Shared:
    """Memory that all processes see."""

    def __init__(self, exports, size, lanes):
        self.expected = [mmap.mmap(-1, size) for _ in range(exports)]
        # What the unanswered request of a client that died would have written.
        self.pending = [mmap.mmap(-1, size) for _ in range(exports)]
        self._numbers = memoryview(mmap.mmap(-1, 8 * len(FIELDS) * exports * lanes)).cast("q")
        self._lanes = lanes

    def notes(self, export, lane):
        return Notes(self._numbers, (export * self._lanes + lane) * len(FIELDS))


class Notes:
    """The numbers of one lane; attributes are named in FIELDS."""

    def __init__(self, numbers, first):
        object.__setattr__(self, "_numbers", numbers)
        object.__setattr__(self, "_first", first)

    def __getattr__(self, name):
        return self._numbers[self._first + FIELDS.index(name)]

    def __setattr__(self, name, value):
        self._numbers[self._first + FIELDS.index(name)] = value


def differing(found, wanted):
    return next(i for i, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1])


def check_either(found, old, new, where):
    """Every byte is the old one or the new one."""
    if found in (old, new):
        return
    for i, byte in enumerate(found):
        if byte not in (old[i], new[i]):
            raise Failure(f"{where}: byte {i} is neither what it was nor what was written")


def retry(request):
    """Repeats a request that storage's errors may hit."""
    for _ in range(MOST_TRIES):
        try:
            return request()
        except nbd.Error as error:
            if error.errnum not in STORAGE_ERRORS:
                raise
    raise Failure(f"{MOST_TRIES} tries in a row failed")


class Lane:
    """The stripes of an export that one client has."""

    def __init__(self, number, count, stripe, size):
        step = count * stripe
        self.stripes = [
            (begin, min(begin + stripe, size))
            for begin in range(RESERVED + number * stripe, size, step)
        ]


Request = collections.namedtuple("Request", "kind begin end data")


class Client:
    """One connection, and a life of some requests."""

    def __init__(self, options, shared, export, number, lane, seed):
        self.random = random.Random(seed)
        self.options = options
        self.where = f"export {export}, lane {number}"
        self.expected = shared.expected[export]
        self.pending = shared.pending[export]
        self.notes = shared.notes(export, number)
        self.lane = lane
        self.position = 0
        self.file = os.open(f"{options.directory}/{export}", os.O_RDONLY)
        self.client = nbd.NBD()
        self.client.set_export_name(str(export))
        self.busy()
        self.client.connect_unix(options.socket)

    def busy(self):
        self.notes.busy_since = time.monotonic_ns()

    def some_range(self, begin, end):
        if self.random.random() < 0.5:
            begin = self.random.randrange(begin, end)
            end = self.random.randrange(begin, end) + 1
        return begin, end

    def choose(self):
        """Requests for ranges that do not overlap: mostly onward, as an image grows."""
        count = min(self.random.randint(1, MOST_AT_ONCE), len(self.lane.stripes))
        if self.random.random() < 0.6:
            chosen = [(self.position + i) % len(self.lane.stripes) for i in range(count)]
            self.position += count
        else:
            chosen = self.random.sample(range(len(self.lane.stripes)), count)
        return [self.request(*self.some_range(*self.lane.stripes[i])) for i in chosen]

    def request(self, begin, end):
        kind = self.random.choices(("write", "fua", "zero", "trim", "read"), (8, 1, 1, 1, 2))[0]
        data = self.random.randbytes(end - begin) if kind in ("write", "fua") else bytes(end - begin)
        return Request(kind, begin, end, data)

    def send(self, request, answered):
        """Returns what has to live until there is an answer."""
        length = request.end - request.begin
        if request.kind == "read":
            buffer = nbd.Buffer(length)
            self.client.aio_pread(buffer, request.begin, answered)
        elif request.kind in ("write", "fua"):
            buffer = nbd.Buffer.from_bytearray(bytearray(request.data))
            flags = nbd.CMD_FLAG_FUA if request.kind == "fua" else 0
            self.client.aio_pwrite(buffer, request.begin, answered, flags)
        else:
            buffer = None
            send = self.client.aio_zero if request.kind == "zero" else self.client.aio_trim
            send(length, request.begin, answered)
        return buffer

    def requests(self, requests):
        """Sends them all at once and waits for the answers."""
        errors = [None] * len(requests)

        def answered(i):
            def note(error):
                errors[i] = error.value
                self.notes.requests += 1
                return 1

            return note

        self.busy()
        buffers = [self.send(request, answered(i)) for i, request in enumerate(requests)]
        while None in errors:
            self.client.poll(-1)
        for request, error, buffer in zip(requests, errors, buffers):
            self.settle(request, error, buffer)

    def settle(self, request, error, buffer):
        begin, end = request.begin, request.end
        if error:
            if error not in STORAGE_ERRORS:
                raise Failure(f"{self.where}: {request.kind} failed: {os.strerror(error)}")
            self.notes.refusals += 1
        if request.kind == "read":
            if not error and buffer.to_bytearray() != self.expected[begin:end]:
                raise Failure(f"{self.where}: does not read its own bytes at {begin}-{end}")
        elif error or request.kind == "trim":
            self.busy()
            found = retry(lambda: self.client.pread(end - begin, begin))
            where = f"{self.where}: {begin}-{end} after a {request.kind}"
            check_either(found, self.expected[begin:end], request.data, where)
            self.expected[begin:end] = bytes(found)
        else:
            self.expected[begin:end] = request.data

    def flush(self):
        self.busy()
        try:
            self.client.flush()
        except nbd.Error as error:
            if error.errnum not in STORAGE_ERRORS:
                raise
            self.notes.refusals += 1
            return
        self.notes.requests += 1
        self.notes.flushes += 1
        for begin, end in self.lane.stripes:
            if os.pread(self.file, end - begin, begin) != self.expected[begin:end]:
                raise Failure(f"{self.where}: {begin}-{end} is not in the file after a flush")

    def check_predecessor(self, lane, notes):
        """Where connections share a cache, nothing is lost with one that died."""
        first = self.random.randrange(len(lane.stripes))
        offset = lane.stripes[first][0]
        stripes = [stripe for stripe in lane.stripes[first:] if stripe[1] - offset <= MOST_READ]
        self.busy()
        found = retry(lambda: self.client.pread(stripes[-1][1] - offset, offset))
        for begin, end in stripes:
            unanswered = begin < notes.pending_end and notes.pending_begin < end
            if not unanswered and found[begin - offset : end - offset] != self.expected[begin:end]:
                raise Failure(f"{self.where}: {begin}-{end} of the client before is lost")

    def die(self):
        """Without goodbye, half of the time with a request that is not answered."""
        if self.random.random() < 0.5:
            request = self.choose()[0]
            if request.kind != "read":
                self.pending[request.begin : request.end] = request.data
                self.notes.pending_begin = request.begin
                self.notes.pending_end = request.end
            _kept = self.send(request, lambda error: 1)
        os.kill(os.getpid(), signal.SIGKILL)

    def live(self, dies):
        for _ in range(self.random.randint(3, 20)):
            self.requests(self.choose())
            if self.random.random() < 0.2:
                self.flush()
        if dies:
            self.die()
        self.client.shutdown()


class Server:
    """nbdkit, seen from outside."""

    def __init__(self, pid):
        self.pid = pid
        self.idle_sockets = self.sockets()
        self.most_memory = 0  # KiB

    def sockets(self):
        directory = f"/proc/{self.pid}/fd"
        count = 0
        for name in os.listdir(directory):
            try:
                count += os.readlink(f"{directory}/{name}").startswith("socket:")
            except FileNotFoundError:
                pass
        return count

    def memory(self):
        """Resident memory in KiB."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
        self.most_memory = max(self.most_memory, kib)
        return kib

    def print_stacks(self):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "print-stacks.sh")
        sys.stdout.flush()
        subprocess.run(["bash", script, str(self.pid)], check=False, stdout=sys.stderr)


class Load:
    """Rounds of clients until the time is over."""

    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.lanes = options.connections * LANES_PER_CONNECTION
        self.shared = Shared(options.exports, options.size, self.lanes)
        self.server = Server(options.server)
        self.living = {}  # process: (export, lane)
        self.next_disturbance = 0
        self.deaths = 0
        self.goodbyes = 0
        for export, expected in enumerate(self.shared.expected):
            with open(f"{options.directory}/{export}", "rb") as file:
                expected[:] = file.read()

    def start(self, export, lane, work, slot=None):
        """Does `work` in a process of its own; `slot` is for a client of a round."""
        self.shared.notes(export, lane).busy_since = time.monotonic_ns()
        process = os.fork()
        if process != 0:
            self.living[process] = (export, lane, slot)
            return
        status = 1
        try:
            work()
            status = 0
        except Failure as failure:
            print(failure, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def start_next(self, export, slot, lanes):
        """The next client of a slot, a list of lanes; it shrinks."""
        number = slot.pop(0)
        predecessor = number - self.options.connections
        seed = self.random.getrandbits(64)
        dies = self.random.random() < 0.5

        def live():
            client = Client(self.options, self.shared, export, number, lanes[number], seed)
            if self.options.shared and predecessor >= 0:
                client.check_predecessor(lanes[predecessor], self.shared.notes(export, predecessor))
            client.live(dies)

        self.start(export, number, live, slot)

    def reap(self):
        """Returns the export and the slot of each client that has ended."""
        ended = []
        while self.living:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            export, number, slot = self.living.pop(process)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self.deaths += 1
            elif status == 0:
                self.goodbyes += slot is not None
            else:
                raise Failure(f"export {export}, lane {number}: the client's status is {status}")
            if slot is not None:
                ended.append((export, slot))
        return ended

    def watch(self):
        """Fails when somebody has waited for an answer for too long."""
        oldest = time.monotonic_ns() - self.options.patience * 10**9
        for export, number, _ in self.living.values():
            if self.shared.notes(export, number).busy_since < oldest:
                self.server.print_stacks()
                raise Failure(
                    f"export {export}, lane {number}: no answer for {self.options.patience} seconds"
                )

    def disturb(self):
        """Storage is now quick, now slow, and sometimes refuses."""
        if time.monotonic() < self.next_disturbance:
            return
        self.next_disturbance = time.monotonic() + 0.1
        rate = self.random.choice(("8M", "40M", "400M", "4G", "4G"))
        with open(self.options.rate_file + ".new", "w", encoding="ascii") as file:
            file.write(rate + "\n")
        os.rename(self.options.rate_file + ".new", self.options.rate_file)
        if self.random.random() < 0.7:
            open(self.options.error_file, "w", encoding="ascii").close()
        elif os.path.exists(self.options.error_file):
            os.unlink(self.options.error_file)

    def undisturbed(self):
        if os.path.exists(self.options.error_file):
            os.unlink(self.options.error_file)
        with open(self.options.rate_file, "w", encoding="ascii") as file:
            file.write("100G\n")

    def round(self, stripe):
        end = time.monotonic() + self.options.seconds / LEAST_ROUNDS
        lanes = [Lane(i, self.lanes, stripe, self.options.size) for i in range(self.lanes)]
        for export in range(self.options.exports):
            for number in range(self.lanes):
                notes = self.shared.notes(export, number)
                notes.pending_begin = notes.pending_end = 0
        for export in range(self.options.exports):
            for first in range(self.options.connections):
                slot = list(range(first, self.lanes, self.options.connections))
                self.start_next(export, slot, lanes)
        while self.living:
            for export, slot in self.wait():
                if slot and time.monotonic() < end:
                    self.start_next(export, slot, lanes)
            self.disturb()

    def wait(self):
        """Waits a little for a client to end; returns what `reap` does."""
        signal.sigtimedwait([signal.SIGCHLD], 0.1)
        self.server.memory()
        self.watch()
        return self.reap()

    def wait_until_alone(self):
        end = time.monotonic() + self.options.patience
        while self.server.sockets() > self.server.idle_sockets:
            if time.monotonic() > end:
                self.server.print_stacks()
                raise Failure("the server does not notice that all clients are gone")
            time.sleep(0.01)

    def compare(self, export):
        client = nbd.NBD()
        client.set_export_name(str(export))
        client.connect_unix(self.options.socket)
        expected = self.shared.expected[export]
        pending = self.shared.pending[export]
        found = bytes(client.pread(self.options.size, 0))
        for number in range(self.lanes):
            notes = self.shared.notes(export, number)
            part = slice(notes.pending_begin, notes.pending_end)
            where = f"export {export}, unanswered request for {part.start}-{part.stop}"
            check_either(found[part], expected[part], pending[part], where)
            expected[part] = found[part]
        if found != expected[:]:
            raise Failure(f"export {export}: byte {differing(found, expected[:])} is wrong")
        client.flush()
        with open(f"{self.options.directory}/{export}", "rb") as file:
            stored = file.read()
        if stored != found:
            raise Failure(f"export {export}: byte {differing(stored, found)} is not stored by a flush")
        client.shutdown()

    def compare_all(self):
        for export in range(self.options.exports):
            self.start(export, 0, lambda export=export: self.compare(export))
        while self.living:
            self.wait()

    def total(self, field):
        return sum(
            getattr(self.shared.notes(export, lane), field)
            for export in range(self.options.exports)
            for lane in range(self.lanes)
        )

    def check_memory(self, idle):
        """`idle` is the memory, in KiB, that was left when nobody was connected, round by round."""
        print(f"memory: {self.server.most_memory} KiB at most, between rounds {idle}")
        if self.options.most_memory:
            middle = len(idle) // 2
            # A connection whose client has died may still be about to end: single rounds vary. What
            # is never given back raises the least of them, too.
            if min(idle[middle:]) > max(idle[:middle]) + self.options.memory_slack:
                raise Failure("memory grows")
            if self.server.most_memory > self.options.most_memory:
                raise Failure(f"more than {self.options.most_memory} KiB")

    def run(self):
        end = time.monotonic() + self.options.seconds
        stripes = [stripe for stripe in STRIPES if stripe * self.lanes < self.options.size]
        idle = []
        while time.monotonic() < end or len(idle) < LEAST_ROUNDS:
            self.round(self.random.choice(stripes))
            self.undisturbed()
            self.wait_until_alone()
            self.compare_all()
            self.wait_until_alone()
            idle.append(self.server.memory())
        print(
            f"{len(idle)} rounds, {self.total('requests')} requests, {self.total('refusals')} refused, "
            f"{self.total('flushes')} flushes; {self.deaths} clients died, {self.goodbyes} said goodbye"
        )
        if not (self.deaths and self.goodbyes and self.total("refusals") and self.total("flushes")):
            raise Failure("that was no load")
        self.check_memory(idle)

    def kill_clients(self):
        for process in self.living:
            os.kill(process, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", type=int, required=True, help="nbdkit's process")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--directory", required=True, help="where the exports' files are: 0, 1, 2, ...")
    parser.add_argument("--rate-file", required=True, help="storage's speed, for nbdkit-rate-filter")
    parser.add_argument("--error-file", required=True, help="storage refuses while it exists")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="of each export, in bytes")
    parser.add_argument("--exports", type=int, default=8)
    parser.add_argument("--connections", type=int, default=2, help="to each export, at any time")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--shared", action="store_true", help="connections see each other's writes at once")
    parser.add_argument("--patience", type=int, default=60, help="seconds that an answer may take")
    parser.add_argument("--most-memory", type=int, default=0, help="KiB; 0: do not look")
    parser.add_argument("--memory-slack", type=int, default=0, help="KiB that memory may grow by")
    options = parser.parse_args()

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    load = Load(options)
    try:
        load.run()
    except Failure as failure:
        sys.exit(f"load_client.py: {failure}")
    finally:
        load.kill_clients()


if __name__ == "__main__":
    main()
