"""The figures that the filter is meant to reach, and whether it does.

A figure is missed when the whole 95 % interval lies beyond it, and open when only a part does.
"""

import operator
from typing import NamedTuple

import guests
from cells import CHECKS, Cell
from extras import MEMORY_SIZES
from intervals import Interval, interval_of, ratios


class Verdict(NamedTuple):
    what: str
    found: Interval
    relation: str
    bound: float

    @property
    def word(self):
        holds = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}[self.relation]
        ends = [holds(end, self.bound) for end in self.found[1:]]
        if all(ends):
            return "holds"
        return "open" if any(ends) else "MISSED"


def verdicts(results):
    """The Verdict for each target that was measured."""
    return [verdict for verdict in _all(results) if verdict.found is not None]


def _all(results):
    def ratio(cell, contender, other, relation, bound, field="seconds", what="time"):
        found = results.ratio(cell, field, contender, other)
        return Verdict(f"{cell.name}: {what}, {contender} / {other}", found, relation, bound)

    for source in ("ones", "tar", "filesystem"):
        for order, bound in (("in-order", 1.05), ("w16", 1.15)):
            cell = Cell("odirect", source, order)
            yield ratio(cell, "filter", "limit", "<=", bound)
            for other in ("none", "blocksize", "cache"):
                yield ratio(cell, "filter", other, "<", 1)

    piece = Cell("delay", "tar-piece")
    yield ratio(piece, "blocksize", "filter", ">=", 60)
    yield ratio(piece, "cache", "filter", ">=", 25)
    yield ratio(Cell("delay", "ones-piece"), "blocksize", "filter", ">=", 60)

    for cell in results.cells():
        if cell.storage == "file":
            yield ratio(cell, "filter", "none", "<=", 1.02)
        for check in CHECKS:
            yield ratio(cell, check, "filter", "<=", 1.25)
    tar = Cell("file", "tar")
    yield ratio(tar, "filter", "none", "<=", 1.15, "processor_ns", "nbdkit's processor time")

    ones = Cell("file-cache-none", "ones")
    counted = results.counted.get((ones, "filter"))
    if counted:
        yield Verdict(f"{ones.name}: writes", _exactly(counted.requests["Write"]), "<=", 60)
        written = results.values(ones, "filter", "write_bytes")
        yield Verdict(f"{ones.name}: bytes written", _interval(written), "<=", 2e6)

    yield from _memory(results)
    for cell in results.cells():
        if cell.storage == "delay-serial":
            yield ratio(cell, "blocksize", "filter", ">=", 10)
            yield ratio(cell, "filter", "none", "<=", 1)
    for question in results.questions():
        if question.startswith("latency"):
            found = _interval(results.answers_of(question, "filter"))
            yield Verdict(f"{question}: 99th percentile, s", found, "<=", 0.001)
    for question in guests.names():
        without = results.answers_of(question, "none")
        for contender in guests.contenders()[1:]:
            answers = results.answers_of(question, contender)
            rates = ratios(answers[: len(without)], without[: len(answers)])
            what = f"{question}: rate, filter ({contender} writers) / none"
            yield Verdict(what, _interval(rates), ">=", 0.95)
    rate = ratios(
        results.answers_of("at-once/file-dir", "eight servers"),
        results.answers_of("at-once/file-dir", "one server"),
    )
    yield Verdict("at-once/file-dir: rate, one server / eight", _interval(rate), ">=", 0.95)


def _memory(results):
    for question in results.questions():
        without = results.answers_of(question, "none")
        if question.startswith("memory") and without:
            for size in MEMORY_SIZES:
                found = [
                    (with_filter - plain) / 1024
                    for with_filter, plain in zip(
                        results.answers_of(question, f"filter {size}M"), without
                    )
                ]
                what = f"{question}: MiB beyond no filter, qcowcache-size={size}M"
                yield Verdict(what, _interval(found), "<=", size + 8)


def _exactly(value):
    return Interval(value, value, value)


def _interval(values):
    return interval_of(values) if values else None
