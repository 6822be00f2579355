"""Medians, and how sure they are.

The interval of a median is taken from the sorted values themselves (order statistics): whatever
the distribution, the median lies between the k-th smallest and the k-th largest of n runs with a
probability that depends on k and n only. Nothing is assumed of the noise, and nothing is random.
"""

import math
import statistics
from typing import NamedTuple


class Interval(NamedTuple):
    """A median, and the bounds that it lies in with 95 % confidence.

    With fewer than six values no bounds are that sure; the smallest and the largest stand there.
    """

    median: float
    low: float
    high: float


def interval_of(values):
    """The Interval of at least one value."""
    ordered = sorted(values)
    rank = _rank(len(ordered))
    return Interval(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def ratios(numerators, denominators):
    """Run by run, so that what slowed down both of a pair cancels out."""
    return [a / b for a, b in zip(numerators, denominators, strict=True) if b]


def _rank(count):
    """The largest k for which the k-th value from either end leaves out no more than 5 %."""
    outside = 0.0
    for rank in range(count // 2 + 1):
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 0.05:
            return max(rank - 1, 0)
    return 0
