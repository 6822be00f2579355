"""Reads what nbdkit's log filter wrote."""

import datetime
import math
import re

_REQUEST = re.compile(
    r"^(\S+ \S+) connection=(\d+) (\.\.\.)?(Read|Write|Zero|Trim|Flush|Extents|Cache) id=(\d+)"
)
_COUNT = re.compile(r" count=0x([0-9a-f]+)")

KINDS = ("Write", "Read", "Zero", "Trim", "Flush", "Extents")


def counts(path):
    """How many requests of each of KINDS there were, and the "bytes" of the writes."""
    found = dict.fromkeys(KINDS, 0)
    found["bytes"] = 0
    with open(path, encoding="ascii", errors="replace") as lines:
        for line in lines:
            match = _REQUEST.match(line)
            if not match or match[3]:
                continue
            kind = match[4]
            if kind in found:
                found[kind] += 1
            if kind == "Write":
                found["bytes"] += int(_COUNT.search(line)[1], 16)
    return found


def write_latencies(path):
    """Seconds that each write took, in the order in which they ended."""
    began = {}
    latencies = []
    with open(path, encoding="ascii", errors="replace") as lines:
        for line in lines:
            match = _REQUEST.match(line)
            if not match or match[4] != "Write":
                continue
            when = datetime.datetime.fromisoformat(match[1])
            request = match[2], match[5]
            if match[3]:
                latencies.append((when - began.pop(request)).total_seconds())
            else:
                began[request] = when
    return latencies


def percentile(values, part):
    """The smallest of the values that at least `part` of them (0 to 1) do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]
