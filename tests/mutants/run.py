#!/usr/bin/env python3
"""Does the filter deliberate damage, and demands that some unit test notices.

`make mutants` in the build tree runs this with what it needs, after `make all` and with the unit
tests built; `make mutants MUTANTS="NAME..."` runs only some. Each mutant of mutants.txt is applied
to a copy of one file of the filter, which alone is compiled anew and linked with the unit tests and
the rest of the core. A mutant that no longer applies, or does not compile, or passes all tests, is
a failure. Takes about a quarter of a minute for each.
"""

import argparse
import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# A test that a mutant makes hang has noticed it.
PATIENCE = 120


@dataclass
class Mutant:
    name: str
    file: str
    meaning: str
    expected: str
    old: str
    new: str


def read_mutants(path):
    form = re.compile(
        r"^=== (?P<name>\S+)  (?P<file>\S+)\n(?P<meaning>.*)\nby:(?P<expected>.*)\n"
        r"--- old\n(?P<old>(?:.*\n)*?)--- new\n(?P<new>(?:.*\n)*?)===$",
        re.MULTILINE,
    )
    text = path.read_text()
    mutants = []
    for match in form.finditer(text):
        parts = {key: value.strip() if key not in ("old", "new") else value.rstrip("\n")
                 for key, value in match.groupdict().items()}
        mutants.append(Mutant(**parts))
    headings = re.findall(r"^=== .*$", text, re.MULTILINE)
    names = {mutant.name for mutant in mutants}
    if len(headings) != len(mutants) or len(names) != len(mutants):
        sys.exit(f"{path}: {len(headings)} headings, {len(mutants)} mutants, {len(names)} names")
    return mutants


def test_names(program):
    """All test cases, as Catch2 2 and 3 list them."""
    listed = subprocess.run([program, "--list-test-names-only"], capture_output=True, text=True)
    if not listed.stdout.strip():
        listed = subprocess.run(
            [program, "--list-tests", "--verbosity", "quiet"], capture_output=True, text=True)
    names = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
    if not names:
        sys.exit(f"{program} lists no tests")
    return names


def passes(program, test):
    """Whether the program passes one test; otherwise why not."""
    pattern = re.sub(r"([,\[\]\\*~\"])", r"\\\1", test)
    try:
        done = subprocess.run(
            # The other reporters take minutes to wrap the lines of a large comparison that fails.
            [program, "--reporter", "compact", pattern], capture_output=True, text=True,
            errors="replace", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    if "No test cases matched" in done.stdout + done.stderr:
        sys.exit(f"no test is called: {test}")
    return None if done.returncode == 0 else "fails"


class Workshop:
    """Where mutants are made and tried."""

    def __init__(self, options, directory, tests):
        self.options = options
        self.directory = Path(directory)
        self.tests = tests

    def build(self, mutant):
        """The unit tests with the mutant in them. Raises ValueError."""
        source = Path(self.options.filter) / mutant.file
        text = source.read_text()
        if text.count(mutant.old) != 1 or not mutant.old.strip():
            raise ValueError(f"what it replaces stands {text.count(mutant.old)} times in {source}")
        place = self.directory / mutant.name
        place.mkdir()
        damaged = place / Path(mutant.file).name
        damaged.write_text(text.replace(mutant.old, mutant.new))
        # A file finds its neighbours by the directory that it is in.
        include = "-I" + str(source.parent)
        made = place / "damaged.o"
        program = place / "unit-tests"
        for command in (
            [*shlex.split(self.options.compile), "-w", include, "-c", str(damaged), "-o", str(made)],
            [*shlex.split(self.options.link), "-o", str(program), str(made),
             *self.options.objects, self.options.core, *shlex.split(self.options.libraries)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise ValueError("does not build:\n" + done.stderr)
        return str(program)

    def noticed_by(self, mutant):
        """The first test that notices the mutant, and how; None if there is none."""
        program = self.build(mutant)
        first = [mutant.expected] if mutant.expected else []
        for test in first + [name for name in self.tests if name != mutant.expected]:
            why = passes(program, test)
            if why:
                return f"{why}: {test}"
        return None

    def judge(self, mutant):
        """One line about the mutant, and whether all is well."""
        try:
            noticed = self.noticed_by(mutant)
        except ValueError as error:
            return f"BROKEN   {mutant.name}: {error}", False
        finally:
            shutil.rmtree(self.directory / mutant.name, ignore_errors=True)
        if noticed is None:
            return f"MISSED   {mutant.name}: {mutant.meaning}", False
        return f"caught   {mutant.name}\n         {noticed}", True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", required=True, help="the directory with the filter's sources")
    parser.add_argument("--compile", required=True, help="how a file of it is compiled")
    parser.add_argument("--link", required=True, help="how the unit tests are linked")
    parser.add_argument("--core", required=True, help="the rest of it, a static library")
    parser.add_argument("--libraries", default="", help="what that needs")
    parser.add_argument("--objects", required=True, nargs="+", help="the unit tests, compiled")
    parser.add_argument("--whole", required=True, help="the undamaged unit tests, linked")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--only", default="", help="names of mutants; the default is all")
    options = parser.parse_args()

    mutants = read_mutants(Path(__file__).with_name("mutants.txt"))
    wanted = options.only.split()
    unknown = set(wanted) - {mutant.name for mutant in mutants}
    if unknown:
        sys.exit("no such mutant: " + ", ".join(sorted(unknown)))
    mutants = [mutant for mutant in mutants if not wanted or mutant.name in wanted]

    tests = test_names(options.whole)
    for name in {mutant.expected for mutant in mutants} - {""}:
        if name not in tests:
            sys.exit(f"mutants.txt: no test is called: {name}")
        why = passes(options.whole, name)
        if why:
            sys.exit(f"the undamaged filter {why}: {name}")

    well = True
    with tempfile.TemporaryDirectory(prefix="qcowcache-mutants.") as directory:
        workshop = Workshop(options, directory, tests)
        with concurrent.futures.ThreadPoolExecutor(max(1, options.jobs)) as pool:
            for line, is_well in pool.map(workshop.judge, mutants):
                print(line, flush=True)
                well = well and is_well
    print(f"{len(mutants)} mutants" + ("" if well else ": not all of them were caught"))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
