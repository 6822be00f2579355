#!/usr/bin/env python3
"""Runs one test for automake's harness ("Custom Test Drivers" in its manual), and says how it
ended, how long that took, and how many are through:

    [12/88] integration/test-convert … ok, 8 s

A test that has not ended after --limit seconds has failed. That is time on a machine which has
nothing else to do: where a short calibration takes longer than it should, so may tests. They find
how many times as long in SLOWNESS, as a whole number.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def parse():
    parser = argparse.ArgumentParser()
    for option in ("--test-name", "--log-file", "--trs-file"):
        parser.add_argument(option, required=True)
    for option in ("--color-tests", "--expect-failure", "--enable-hard-errors"):
        parser.add_argument(option, default="no")
    parser.add_argument("--limit", type=int, required=True, help="seconds")
    parser.add_argument("--all", required=True, help="the logs of all tests of this run")
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def slowness():
    """How many times as long as it should this machine takes at the moment, at least once."""
    expected = 0.2
    begin = time.monotonic()
    sum(i * i for i in range(1_000_000))
    return int((time.monotonic() - begin) / expected) + 1


class Run:
    """A test in a process group of its own, so that all that it starts ends with it."""

    def __init__(self, command, log):
        self.begin = time.monotonic()
        self.slow = slowness()
        # functions.sh has a limit of its own, for who runs a test by hand.
        environment = dict(os.environ, SLOWNESS=str(self.slow), TEST_TIMEOUT="86400")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                        stderr=subprocess.STDOUT, start_new_session=True,
                                        env=environment)

    def seconds(self):
        return time.monotonic() - self.begin

    def wait(self, limit):
        """Its status; None if it took too long, also on a machine that is as slow as this one."""
        while True:
            try:
                return self.process.wait(max(limit * self.slow - self.seconds(), 1))
            except subprocess.TimeoutExpired:
                self.slow = max(self.slow, slowness())
                if self.seconds() >= limit * self.slow:
                    self.end()
                    return None

    def end(self):
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def last_line(log):
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "nothing"


def main():
    options = parse()
    log = Path(options.log_file)
    with log.open("wb") as output:
        run = Run(options.command, output)

        def stop(number, _frame):
            run.end()
            sys.exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)
        status = run.wait(options.limit)
    if status is None:
        result = "FAIL"
        said = (f"too slow here, or it hangs: ended after {run.seconds():.0f} s, where all takes "
                f"{run.slow} times as long as it should; it said last: {last_line(log)}")
    else:
        result = {0: "PASS", 77: "SKIP"}.get(status, "FAIL")
        said = {"PASS": "ok", "SKIP": "skipped"}.get(result, f"FAILED with {status}")
    with log.open("a") as output:
        output.write(f"{result} {options.test_name}: {said}\n")
    recheck = "no" if result == "PASS" else "yes"
    Path(options.trs_file).write_text(f":test-result: {result}\n:test-global-result: {result}\n"
                                      f":recheck: {recheck}\n:copy-in-global-log: {recheck}\n")
    logs = options.all.split()
    through = sum(Path(each).with_suffix(".trs").exists() for each in logs)
    name = options.test_name.removesuffix(".sh")
    line = f"[{through}/{len(logs)}] {name} … {said}, {run.seconds():.0f} s"
    if options.color_tests == "yes" and result == "FAIL":
        line = f"\033[31m{line}\033[m"
    os.write(sys.stdout.fileno(), f"{line}\n".encode())  # at once, beside others


main()
