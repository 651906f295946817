"""One view of a sketch, which answers questions such as quantiles.

It costs nothing until it is asked: most readers want a few numbers of one of the two views of a sketch.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from math import ceil, fsum, sqrt
from typing import NamedTuple

from tapes.bins import bin_key, bin_value
from tapes.errors import InvalidArgument
from tapes.sums import Number

__all__ = ["Bins", "Distribution"]

_HALF_BIN = 2.0**-8


@lru_cache(maxsize=256)
def _keys_of(bounds: tuple[float, ...]) -> list[int]:
    return list(map(bin_key, bounds))


class Bins(NamedTuple):
    """The keys of the bins, ascending, the number or weight of the values in each, their sum and extremes."""

    keys: Sequence[int]
    weights: Sequence[Number]
    total: float
    low: float
    high: float

    def clamp(self, value: float) -> float:
        """Return ``value``, or the extreme that it is beyond."""
        return min(max(value, self.low), self.high)


class Distribution:
    """Answers questions on a distribution: bins with weights, in the order of their values."""

    __slots__ = ("_load", "_loaded")

    def __init__(self, load: Callable[[], Bins]) -> None:
        self._load = load
        self._loaded: tuple[Bins, list[Number]] | None = None

    def _bins(self) -> tuple[Bins, list[Number]]:
        """Return the bins and their cumulative weights, computed by the first question."""
        loaded = self._loaded
        if loaded is None:
            bins = self._load()
            loaded = self._loaded = (bins, list(accumulate(bins.weights)))
        return loaded

    @property
    def count(self) -> Number:
        """The number of values; a whole number for the lifetime view, a sum of weights for the recent one."""
        _, cumulative = self._bins()
        return cumulative[-1] if cumulative else 0

    @property
    def sum(self) -> float:
        """The sum of the values, weighted likewise."""
        return self._bins()[0].total

    @property
    def min(self) -> float:
        """The smallest value; 0.0 when empty."""
        bins, cumulative = self._bins()
        return bins.low if cumulative else 0.0

    @property
    def max(self) -> float:
        """The largest value; 0.0 when empty."""
        bins, cumulative = self._bins()
        return bins.high if cumulative else 0.0

    @property
    def mean(self) -> float:
        """The mean of the values; 0.0 when empty.

        Exact over the lifetime. A recent sum keeps rounding errors of values that have long lost their
        weight. So it is limited by the bins, which forget: to within 0.4 % of the values' magnitudes.
        """
        bins, cumulative = self._bins()
        if not cumulative:
            return 0.0
        total, count = bins.total, cumulative[-1]
        if isinstance(count, int):
            return bins.clamp(total / count)
        products = [weight * bin_value(key) for key, weight in zip(bins.keys, bins.weights)]
        by_bins, slack = fsum(products), fsum(map(abs, products)) * _HALF_BIN
        total = min(max(total, by_bins - slack), by_bins + slack)
        return bins.clamp(total / count)

    @property
    def stddev(self) -> float:
        """The standard deviation of the values' bins; 0.0 when empty."""
        bins, cumulative = self._bins()
        scale = max(abs(self.min), abs(self.max))
        if not scale:
            return 0.0
        mean = self.mean / scale
        squares = (
            weight * (bins.clamp(bin_value(key)) / scale - mean) ** 2
            for key, weight in zip(bins.keys, bins.weights)
        )
        return min(scale * sqrt(fsum(squares) / cumulative[-1]), sys.float_info.max)

    def quantile(self, q: float) -> float:
        """Return the value at quantile ``q`` by nearest rank, within 0.4 %; 0.0 when empty.

        Args:
            q: From 0.0 (the exact minimum) to 1.0 (the exact maximum).

        Raises:
            InvalidArgument: If ``q`` is not in that range.
        """
        if not 0.0 <= q <= 1.0:
            raise InvalidArgument(
                "a quantile", got=q, expected="a number from 0 to 1", remedy="0.99 is the 99th percentile"
            )
        bins, cumulative = self._bins()
        if not cumulative or q == 0.0:
            return self.min
        if q == 1.0:
            return self.max
        rank = q * cumulative[-1] * (1 - 1e-9)  # a product of floats may be too large
        if isinstance(cumulative[-1], int):
            rank = max(1, ceil(rank))
        index = min(bisect_left(cumulative, rank), len(cumulative) - 1)
        return bins.clamp(bin_value(bins.keys[index]))

    def fraction_below(self, x: float) -> float:
        """Return the share of values at or below ``x``, from 0.0 to 1.0; 0.0 when empty.

        The whole bin of ``x`` counts: values up to 0.8 % above ``x`` may count too.
        """
        count = self.count
        return self.count_below(x) / count if count else 0.0

    def count_below(self, x: float) -> Number:
        """Return the number of values at or below ``x``, counting the whole bin of ``x``."""
        bins, cumulative = self._bins()
        if not cumulative or x < bins.low:
            return 0
        if x >= bins.high:
            return cumulative[-1]
        below = bisect_right(bins.keys, bin_key(x))
        return cumulative[below - 1] if below else 0

    def counts_below(self, bounds: tuple[float, ...]) -> list[Number]:
        """Return `count_below` of each of ``bounds``, which ascend, and last the count of all values."""
        bins, cumulative = self._bins()
        if not cumulative:
            return [0] * (len(bounds) + 1)
        keys, low = bins.keys, bins.low
        counts: list[Number] = []
        below = 0
        for bound, key in zip(bounds, _keys_of(bounds)):
            below = bisect_right(keys, key, below)
            counts.append(cumulative[below - 1] if below and bound >= low else 0)
        counts.append(cumulative[-1])
        return counts

    def bins(self) -> list[tuple[float, Number]]:
        """Return ``(centre, weight)`` of every bin that has a value, in ascending order."""
        bins, _ = self._bins()
        return [(bin_value(key), weight) for key, weight in zip(bins.keys, bins.weights)]
