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
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import traceback

from nbd_clients import STORAGE_ERRORS, Client, Lane, Model, Wrong, connect, stored

LANES_PER_CONNECTION = 3
LEAST_ROUNDS = 6
MOST_AT_ONCE = 6
STRIPES = (61, 700, 1024, 3000, 20000, 65536, 200000)
MOST_READ = 1 << 19

# What a client tells the others, one number each.
FIELDS = ("busy_since", "requests", "refusals", "flushes", "pending_begin", "pending_end")


class Shared:
    """Memory that all processes see."""

    def __init__(self, exports, size, lanes):
        self.models = [Model(mmap.mmap(-1, size)) for _ in range(exports)]
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


class LoadClient(Client):
    """One connection, and a life of some requests."""

    kinds = {"write": 9, "zero": 1, "trim": 1, "read": 2}

    def __init__(self, options, shared, export, number, lane, seed):
        self.notes = shared.notes(export, number)
        self.busy()
        super().__init__(
            connect(options.socket, str(export)), shared.models[export], random.Random(seed),
            f"export {export}, lane {number}", f"{options.directory}/{export}", STORAGE_ERRORS)
        self.pending = shared.pending[export]
        self.lane = lane
        self.position = 0

    def busy(self):
        self.notes.busy_since = time.monotonic_ns()

    def count(self, request):
        self.notes.requests += 1
        self.notes.refusals += bool(request.error)

    def read(self, begin, end):
        self.busy()
        return super().read(begin, end)

    def choose(self):
        """Ranges that do not overlap: mostly onward, as an image grows."""
        count = min(self.dice.randint(1, MOST_AT_ONCE), len(self.lane))
        if self.dice.random() < 0.6:
            chosen = [(self.position + i) % len(self.lane) for i in range(count)]
            self.position += count
        else:
            chosen = self.dice.sample(range(len(self.lane)), count)
        return [self.lane.some_range(self.dice, i) for i in chosen]

    def requests(self):
        """Sends some at once and waits for the answers."""
        self.busy()
        for request in [self.begin(*each) for each in self.choose()]:
            request.finish()

    def flush_all(self):
        self.busy()
        flushed = self.flush(*self.lane)
        self.notes.requests += flushed
        self.notes.flushes += flushed
        self.notes.refusals += not flushed

    def check_predecessor(self, lane, notes):
        """Where connections share a cache, nothing is lost with one that died."""
        first = self.dice.randrange(len(lane))
        offset = lane[first][0]
        stripes = [stripe for stripe in list(lane)[first:] if stripe[1] - offset <= MOST_READ]
        found = self.read(offset, stripes[-1][1])
        for begin, end in stripes:
            unanswered = begin < notes.pending_end and notes.pending_begin < end
            if not unanswered:
                self.model.same(found[begin - offset:end - offset], begin, f"{self.name}: of the client before")

    def die(self):
        """Without goodbye, half of the time with a request that is not answered."""
        if self.dice.random() < 0.5:
            request = self.begin(*self.choose()[0])
            if request.kind != "read":
                self.pending[request.begin:request.end] = request.data
                self.notes.pending_begin = request.begin
                self.notes.pending_end = request.end
        os.kill(os.getpid(), signal.SIGKILL)

    def live(self, dies):
        for _ in range(self.dice.randint(3, 20)):
            self.requests()
            if self.dice.random() < 0.2:
                self.flush_all()
        if dies:
            self.die()
        self.nbd.shutdown()


class Server:
    """nbdkit, seen from outside."""

    def __init__(self, pid):
        self.pid = pid
        self.idle_sockets = self.sockets()

    def sockets(self):
        directory = f"/proc/{self.pid}/fd"
        count = 0
        for name in os.listdir(directory):
            try:
                count += os.readlink(f"{directory}/{name}").startswith("socket:")
            except FileNotFoundError:
                pass
        return count

    def memory(self, what="VmRSS"):
        """Resident memory in KiB; VmHWM: the most that there has been."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(what + ":"))

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
        for export, model in enumerate(self.shared.models):
            model.held[:] = stored(f"{options.directory}/{export}")

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
        except Wrong as failure:
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
            client = LoadClient(self.options, self.shared, export, number, lanes[number], seed)
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
                raise Wrong(f"export {export}, lane {number}: the client's status is {status}")
            if slot is not None:
                ended.append((export, slot))
        return ended

    def watch(self):
        """Fails when somebody has waited for an answer for too long."""
        oldest = time.monotonic_ns() - self.options.patience * 10**9
        for export, number, _ in self.living.values():
            if self.shared.notes(export, number).busy_since < oldest:
                self.server.print_stacks()
                raise Wrong(
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
        self.watch()
        return self.reap()

    def wait_until_alone(self):
        end = time.monotonic() + self.options.patience
        while self.server.sockets() > self.server.idle_sockets:
            if time.monotonic() > end:
                self.server.print_stacks()
                raise Wrong("the server does not notice that all clients are gone")
            time.sleep(0.01)

    def compare(self, export):
        """All of an export: nobody else is connected."""
        model, size = self.shared.models[export], self.options.size
        client = Client(connect(self.options.socket, str(export)), model, self.random, f"export {export}")
        for number in range(self.lanes):
            notes = self.shared.notes(export, number)
            begin, end = notes.pending_begin, notes.pending_end
            if begin < end:
                found = client.read(begin, end)
                model.seen(found, begin, f"export {export}: unanswered", self.shared.pending[export][begin:end])
        client.same(0, size, "between two rounds")
        client.flush()
        model.same(stored(f"{self.options.directory}/{export}", 0, size), 0, f"export {export}: stored by a flush")
        client.nbd.shutdown()

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
        most = self.server.memory("VmHWM")
        print(f"memory: {most} KiB at most, between rounds {idle}")
        if self.options.most_memory:
            middle = len(idle) // 2
            # A connection whose client has died may still be about to end: single rounds vary. What
            # is never given back raises the least of them, too.
            if min(idle[middle:]) > max(idle[:middle]) + self.options.memory_slack:
                raise Wrong("memory grows")
            if most > self.options.most_memory:
                raise Wrong(f"more than {self.options.most_memory} KiB")

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
            raise Wrong("that was no load")
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
    except Wrong as failure:
        sys.exit(f"load_client.py: {failure}")
    finally:
        load.kill_clients()


if __name__ == "__main__":
    main()
