"""Servers and clients as processes, and what the kernel says of them."""

import os
import pathlib
import shlex
import signal
import subprocess
import time
from typing import NamedTuple


class Failed(Exception):
    """A program did not do what it should; the text says which and what it said."""


class Usage(NamedTuple):
    """What a process has used so far."""

    processor_ns: int
    peak_kib: int
    read_bytes: int
    write_bytes: int


class Ended(NamedTuple):
    """What a process that has ended took."""

    seconds: float
    processor_ns: int
    peak_kib: int
    read_bytes: int
    write_bytes: int


def wait_until(condition, seconds, what):
    """Returns as soon as condition() holds; Failed if it does not within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.005)


def usage_of(pid):
    """The Usage of a process that is running, all its threads together."""
    process = pathlib.Path("/proc") / str(pid)
    io = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
    peak = next(
        line.split()[1]
        for line in (process / "status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return Usage(processor_ns(pid), int(peak), int(io["read_bytes"]), int(io["write_bytes"]))


def processor_ns(pid):
    """Processor time in nanoseconds: schedstat's counter, summed up over all threads.

    /proc/PID/task/*/schedstat has no threads that have ended, and nbdkit ends its threads with
    each connection; the process's own clock keeps them. See clock_getcpuclockid(3): this is the
    number of that clock.
    """
    scheduler_clock = 2
    return time.clock_gettime_ns(~pid << 3 | scheduler_clock)


def _start(command, log, environment):
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
        )


class Client:
    """A program that is started, does its work, and ends."""

    def __init__(self, command, log, environment=None):
        self._command = command
        self._log = log
        self.started = time.monotonic()
        self._process = _start(command, log, environment)

    def wait(self):
        """Waits for the end, which must be a good one; returns Ended."""
        try:
            _, status, used = os.wait4(self._process.pid, 0)
        except BaseException:
            self._process.kill()
            raise
        seconds = time.monotonic() - self.started
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode != 0:
            raise Failed(_complaint(self._command, self._process.returncode, self._log))
        block = 512
        return Ended(
            seconds,
            round((used.ru_utime + used.ru_stime) * 1e9),
            used.ru_maxrss,
            used.ru_inblock * block,
            used.ru_oublock * block,
        )


def run(command, log, environment=None):
    """Runs a program to its end; returns Ended."""
    return Client(command, log, environment).wait()


class Server:
    """A program that serves until it is told to end. Use it in a `with`."""

    def __init__(self, command, log, is_up, environment=None):
        self._command = command
        self._log = log
        self._process = _start(command, log, environment)
        self.pid = self._process.pid
        try:
            wait_until(lambda: is_up() or self._has_ended(), 30, shlex.join(command))
            if self._has_ended():
                raise Failed(_complaint(command, self._process.returncode, log))
            self._at_start = usage_of(self.pid)
        except BaseException:
            self.kill()
            raise

    def _has_ended(self):
        return self._process.poll() is not None

    def usage(self):
        """Since it began to serve; the peak is that of its whole life."""
        now = usage_of(self.pid)
        start = self._at_start
        return Usage(
            now.processor_ns - start.processor_ns,
            now.peak_kib,
            now.read_bytes - start.read_bytes,
            now.write_bytes - start.write_bytes,
        )

    def stop(self):
        """Asks it to end and waits until it has; returns the seconds that took."""
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            raise Failed(f"does not end: {shlex.join(self._command)}") from None
        if self._process.returncode != 0:
            raise Failed(_complaint(self._command, self._process.returncode, self._log))
        return time.monotonic() - started

    def kill(self):
        if not self._has_ended():
            self._process.kill()
            self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.kill()


def nbdkit(arguments, directory, name="nbdkit", environment=None):
    """An nbdkit that serves on directory/NAME.sock; returns its Server."""
    socket = directory / f"{name}.sock"
    pidfile = directory / f"{name}.pid"
    for stale in (socket, pidfile):
        stale.unlink(missing_ok=True)
    command = ["nbdkit", "-f", "-P", str(pidfile), "-U", str(socket), *map(str, arguments)]
    # The cache filter keeps its copy of the disk there.
    environment = {"TMPDIR": str(directory), **(environment or {})}
    return Server(
        command,
        directory / f"{name}.err",
        lambda: pidfile.exists() and pidfile.stat().st_size > 0,
        environment,
    )


def direct_qemu_nbd(disk, directory):
    """A qemu-nbd that opens the disk with O_DIRECT, on directory/direct.sock; returns its Server."""
    socket = directory / "direct.sock"
    socket.unlink(missing_ok=True)
    command = ["qemu-nbd", "--cache=none", "--aio=native", "-f", "raw", "-k", str(socket)]
    command += ["-t", "-e", "16", str(disk)]
    return Server(command, directory / "qemu-nbd.err", socket.exists)


def uri(directory, name="nbdkit", export=""):
    return f"nbd+unix:///{export}?socket={directory / (name + '.sock')}"


def _complaint(command, status, log):
    said = pathlib.Path(log).read_text(errors="replace").strip().splitlines()[-5:]
    return f"status {status} from {shlex.join(command)}: " + " / ".join(said)
