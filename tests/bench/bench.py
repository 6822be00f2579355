#!/usr/bin/python3
"""Measures what the filter saves, against everything that a user could pick instead.

All contenders of a cell run in turn, and again in another order, as many rounds as asked for.
Results: results.txt (for people), results.csv, runs.csv, answers.csv, time.svg, requests.svg.
"""

import argparse
import fnmatch
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # the source directory stays as it is

# pylint: disable=wrong-import-position
import cells
import extras
import report
import results as measurements
from conversions import Settings, count, measure
from processes import Failed
from sources import SIZES, Sources


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="cells are STORAGE/SOURCE/ORDER/COMPRESSION/CLIENT: "
        f"{', '.join(cells.STORAGES)} / {', '.join(SIZES)} / {', '.join(cells.ORDERS)} / "
        f"{', '.join(cells.COMPRESSIONS)} / {', '.join(cells.CLIENTS)}; "
        f"other questions: {', '.join(extras.names())}",
    )
    parser.add_argument("--filter", default="qcowcache", help="as nbdkit's --filter takes it")
    parser.add_argument(
        "--parameters", default="", metavar="WORDS", help='for the filter: "qcowcache-writers=0"'
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick", action="store_true", help="small sources, few cells, 3 rounds: some minutes"
    )
    extent.add_argument("--every", action="store_true", help="the whole matrix: days")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="of these, only cells and questions whose name has PATTERN (with * and ?) in it; "
        "repeatable; together with --every, any cell at all",
    )
    parser.add_argument(
        "--contenders", metavar="NAMES", help="only these, separated by commas; and the limit"
    )
    parser.add_argument("--pairs", type=int, metavar="N", help="rounds (11; quick: 3)")
    parser.add_argument("--no-counting", action="store_true", help="do not count requests")
    parser.add_argument(
        "--target-cache", default="none", metavar="MODE", help="qemu-img's -t over NBD (none)"
    )
    parser.add_argument(
        "--sources", type=pathlib.Path, metavar="DIR", help="keep the sources there for next time"
    )
    parser.add_argument(
        "--scratch",
        default=os.environ.get("TMPDIR", "/var/tmp"),
        metavar="DIR",
        help="where disks are written: on a filesystem that has O_DIRECT, with some GiB free",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("bench-results"), metavar="DIR"
    )
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    return parser.parse_args()


def selected(names, patterns):
    """All of them where there are no patterns."""
    return [
        name
        for name in names
        if not patterns or any(fnmatch.fnmatchcase(name, f"*{pattern}*") for pattern in patterns)
    ]


class Progress:
    """Says on stderr how far it is, and how long it may still take."""

    def __init__(self, steps):
        self._steps = steps
        self._done = 0
        self._began = time.monotonic()

    def say(self, what):
        elapsed = time.monotonic() - self._began
        left = ""
        if self._done:
            minutes = elapsed / self._done * (self._steps - self._done) / 60
            left = f", about {minutes:.0f} min left"
        self._done += 1
        print(f"[{self._done}/{self._steps}{left}] {what}", file=sys.stderr, flush=True)


def in_turn(names, rounds):
    """Every name once a round, each round beginning with another, so that none always follows
    the same one."""
    for number in range(rounds):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            yield number, name


def wanted_contenders(names, options):
    if not options.contenders:
        return list(names)
    wanted = [*options.contenders.split(","), "limit"]
    return [name for name in names if name in wanted]


def work(options, settings, sources, rounds, results, save):
    chosen = cells.quick_cells() if options.quick else cells.chosen_cells()
    if options.every:
        chosen = cells.every_cell()
    names = selected([cell.name for cell in chosen], options.only)
    chosen = [cell for cell in chosen if cell.name in names]
    questions = selected(extras.names(), options.only)
    if options.list:
        print("\n".join([*names, *questions]))
        return
    if not chosen and not questions:
        raise Failed("no cell has such a name; --list names them all")

    steps = 0
    for cell in chosen:
        names = wanted_contenders(cell.contenders, options)
        counted = 0 if options.no_counting else len(set(names) & set(cells.FILTERS))
        steps += len(names) * rounds + counted
    for question in questions:
        steps += len(wanted_contenders(extras.contenders(question), options)) * rounds
    progress = Progress(steps)

    for cell in chosen:
        source = sources.path(cell.source)
        names = wanted_contenders(cell.contenders, options)
        if not options.no_counting:
            for name in names:
                if name in cells.FILTERS:
                    progress.say(f"{cell.name}: {name}, counting requests")
                    results.counted[cell, name] = count(settings, cell, name, source)
        results.runs.update({(cell, name): [] for name in names})
        for number, name in in_turn(names, rounds):
            progress.say(f"{cell.name}: {name}, round {number + 1}")
            results.runs[cell, name].append(measure(settings, cell, name, source))
        save()
    for question in questions:
        names = wanted_contenders(extras.contenders(question), options)
        results.answers.update({(question, name): [] for name in names})
        for number, name in in_turn(names, rounds):
            progress.say(f"{question}: {name}, round {number + 1}")
            results.answers[question, name].append(
                extras.ask(settings, sources, question, name)
            )
        save()


def main():
    options = arguments()
    missing = [
        program
        for program in ("fio", "nbdkit", "qemu-img", "qemu-nbd", "nbdcopy", "mke2fs", "tar", "gnuplot")
        if not shutil.which(program)
    ]
    if missing:
        raise Failed(f"missing: {', '.join(missing)}; ./bootstrap bench installs them")
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    rounds = options.pairs or (3 if options.quick else 11)
    results = measurements.Results()
    if not options.list:
        options.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="bench.", dir=options.scratch) as scratch:
        # Some of the servers change directory, and some want absolute names anyway.
        directory = pathlib.Path(scratch).resolve()
        kept = (options.sources or directory).resolve()
        kept.mkdir(parents=True, exist_ok=True)
        sources = Sources(kept, options.quick)
        settings = Settings(
            options.filter, tuple(options.parameters.split()), directory, options.target_cache
        )

        def save():
            """After each cell: who interrupts a long benchmark keeps what it has."""
            text = report.text(results, sources, command)
            (options.out / "results.txt").write_text(text, encoding="utf-8")
            measurements.write_csv(results, options.out / "results.csv")
            measurements.write_runs_csv(results, options.out / "runs.csv")
            measurements.write_answers_csv(results, options.out / "answers.csv")
            try:
                report.plot(results, options.out)
            except Failed as failure:
                print(f"bench: no plots: {failure}", file=sys.stderr)

        work(options, settings, sources, rounds, results, save)
        if not options.list:
            print((options.out / "results.txt").read_text(encoding="utf-8"), end="")
            print(f"results in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    # Servers and disks go, however it ends.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except Failed as failure:
        sys.exit(f"bench: {failure}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")
