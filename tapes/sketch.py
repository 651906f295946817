"""The log-linear sketch: a distribution in a few hundred numbers, exact to merge.

Theory. `tapes.bins` gives every value a bin that depends on the value alone. Hence merging is addition of
counts: commutative, associative and exact. A constant stream is exact too, because answers are clamped to the
exact minimum and maximum.

One sketch gives two views of a stream. *Lifetime* has every value since the start. *Recent* has the same bins
with weights that fall by e^(-0.015·t). It is Dropwizard's exponentially decaying reservoir without the
sampling: deterministic, and mergeable because a weight is a sum. It advances on the 5 s grid of
`tapes.clock`. A sketch keeps its weights as of the tick of its newest value; time alone never changes it. A
merge brings all weights to the newest of those ticks. So an idle stream keeps its last view.

A `Sketch` is immutable: folding and merging return new ones. So any thread, signal handler or reader that
has one has a consistent cut. To be cheap, values are added in three steps:

1. A fold adds their keys to a list of `pending` ones, two bytes each, and updates count, sum and extremes.
2. Thousands of pending keys are counted at once, in C, into `fresh` counts of the current tick.
3. Fresh counts go into the bins when the tick changes and when a reader asks (`compacted`).

Bins are three flat arrays in the order of their keys: twelve bytes a bin, more only if a count is beyond
65,535.

Source: the decay is Cormode et al., "Forward Decay", 2009, with Dropwizard's alpha of 0.015 per second.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import compress
from math import exp, fsum, inf
from typing import NamedTuple

from tapes.bins import bin_key, bin_keys, bin_value
from tapes.clock import TICK_SECONDS
from tapes.distribution import Bins, Distribution
from tapes.sums import Number, check_sum, exact_sum, sum_of_batch

PENDING = 4096
"""Pending keys that are counted at once; two more for each fresh count that exists already."""

MAX_VALUES = (1 << 64) - 1
"""Maximum of a count; the arrays have no room for more."""

_PLAIN = frozenset({int, float})
_HUGE = 1e288
"""Sums need a check only if there was a larger value: `MAX_VALUES` smaller ones add up to a float."""
_FEW = 8
"""Fresh keys are few if there are at least this many bins for each."""
_DECAY_PER_TICK = 0.015 * TICK_SECONDS
_FORGOTTEN = 1e-15
"""A recent weight below this is dropped: one value, 38 minutes after it was the newest."""
_RECENT = 0.01
"""The least weight that counts for the recent minimum and maximum: one value, about five minutes old."""


class Sketch(NamedTuple):
    """The mergeable state of a distribution; see the module for its theory.

    Attributes:
        count: The number of values, those with pending keys included.
        sum_parts: Numbers whose exact sum is that of all values; canonical once compacted.
        low, high: The exact smallest and largest value; meaningless while ``count`` is 0.
        keys, counts: The keys of the bins, ascending, and the number of values in each over the lifetime.
        weights: The recent weight of each bin as of ``tick``; a value weighs 1.0 in its own tick.
        recent_sum: The sum of all values, weighted likewise.
        fresh_keys, fresh_counts: Values of this tick that are counted, but not in the bins yet.
        pending: The keys of further values of this tick, in any order.
    """

    count: int = 0  # type: ignore[assignment]  # shadows tuple.count, on purpose
    sum_parts: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0
    keys: array[int] = array("h")
    counts: array[int] = array("H")
    tick: int = 0
    weights: array[float] = array("d")
    recent_sum: float = 0.0
    fresh_keys: array[int] = array("h")
    fresh_counts: array[int] = array("H")
    pending: array[int] = array("h")

    def fold(self, values: list[Number], tick: int, least: float = -inf) -> Sketch:
        """Return this sketch with ``values``, at least one, added as of ``tick``.

        ``least`` is the same for all batches of a sketch.

        Cost: 0.17 µs a value for 250 bins, 0.28 µs for 1,500, in batches of 256, compaction included.

        Raises:
            ValueError, TypeError, OverflowError: If a value is not a finite number or is below ``least``, if
                a sum would be beyond the range of floats, or if the first or the last value is no plain
                ``int`` or ``float``. Nothing is added then. Foreign numbers between these two may warn.
        """
        if type(values[0]) not in _PLAIN or type(values[-1]) not in _PLAIN:
            raise TypeError("not all are plain numbers")
        (
            count, sum_parts, low, high, keys, counts, tick, weights, recent_sum,
            fresh_keys, fresh_counts, pending,
        ) = self._as_of(tick)  # fmt: skip
        new, low, high = bin_keys(values, low, high) if count else bin_keys(values)
        if low < least:
            raise ValueError(f"a value is less than {least:g}")
        if high > _HUGE or low < -_HUGE:
            check_sum(sum_parts, values)
            check_sum((recent_sum,), values)
        batch_parts = sum_of_batch(values, low)
        folded = Sketch(
            count + len(values), (*sum_parts, *batch_parts), low, high, keys, counts, tick, weights,
            recent_sum + fsum(batch_parts), fresh_keys, fresh_counts, pending + new,
        )  # fmt: skip
        return folded if len(folded.pending) < PENDING + 2 * len(folded.fresh_keys) else folded._counted()

    @property
    def is_compacted(self) -> bool:
        return not self.pending and not self.fresh_keys

    def _fresh(self) -> Counter[int]:
        fresh = Counter(dict(zip(self.fresh_keys, self.fresh_counts)))
        fresh.update(self.pending)
        return fresh

    def _counted(self) -> Sketch:
        """Return the same with all pending keys among the fresh counts."""
        fresh = self._fresh()
        keys, counts = array("h", list(fresh)), counts_array(list(fresh.values()))
        return self._replace(
            sum_parts=exact_sum(self.sum_parts), fresh_keys=keys, fresh_counts=counts, pending=EMPTY.pending
        )

    def compacted(self) -> Sketch:
        """Return the same with all values in their bins."""
        if self.is_compacted:
            return self
        fresh = self._fresh()
        if _FEW * len(fresh) <= len(self.keys):
            with suppress(OverflowError):  # a count is beyond the narrow array
                return self._with_few(fresh)
        keys, counts, weights = self.keys.tolist(), self.counts.tolist(), self.weights.tolist()
        place_of = dict(zip(keys, range(len(keys))))
        new = [key for key in fresh if key not in place_of]
        for key in new:
            place = bisect_left(keys, key)
            keys.insert(place, key)
            counts.insert(place, 0)
            weights.insert(place, 0.0)
        if new:
            place_of = dict(zip(keys, range(len(keys))))
        for key, count in fresh.items():
            place = place_of[key]
            counts[place] += count
            weights[place] += count
        return self._with_bins(array("h", keys), counts_array(counts), array("d", weights))

    def _with_few(self, fresh: Counter[int]) -> Sketch:
        keys, counts, weights = self.keys[:], self.counts[:], self.weights[:]
        for key, count in fresh.items():
            place = bisect_left(keys, key)
            if place == len(keys) or keys[place] != key:
                keys.insert(place, key)
                counts.insert(place, 0)
                weights.insert(place, 0.0)
            counts[place] += count
            weights[place] += count
        return self._with_bins(keys, counts, weights)

    def _with_bins(self, keys: array[int], counts: array[int], weights: array[float]) -> Sketch:
        return Sketch(
            self.count, exact_sum(self.sum_parts), self.low, self.high, keys, counts, self.tick, weights,
            self.recent_sum,
        )  # fmt: skip

    def _as_of(self, tick: int) -> Sketch:
        """Return this sketch, compacted and with its recent weights as of ``tick`` if that is later."""
        if tick <= self.tick:
            return self
        sketch = self.compacted()
        decay = exp(-_DECAY_PER_TICK * (tick - self.tick))
        least = _FORGOTTEN / decay if decay else float("inf")
        weights = array("d", [w * decay if w >= least else 0.0 for w in sketch.weights])
        return sketch._replace(tick=tick, weights=weights, recent_sum=sketch.recent_sum * decay)

    @staticmethod
    def merge(sketches: Iterable[Sketch]) -> Sketch:
        """Return the sketch of all streams; counts, bins and sum do not depend on the order."""
        full = [sketch for sketch in sketches if sketch.count]
        if len(full) < 2:
            return full[0].compacted() if full else EMPTY
        if sum(sketch.count for sketch in full) > MAX_VALUES:  # a worker lies; it must not break the others
            return max(full).compacted()
        tick = max(sketch.tick for sketch in full)
        counts: dict[int, int] = {}
        weights: dict[int, float] = {}
        recent_sums = []
        for sketch in full:
            aged = sketch.compacted()._as_of(tick)
            recent_sums.append(aged.recent_sum)
            for key, count, weight in zip(aged.keys, aged.counts, aged.weights):
                if key in counts:
                    counts[key] += count
                    weights[key] += weight
                else:
                    counts[key], weights[key] = count, weight
        keys = sorted(counts)
        return Sketch(
            sum(sketch.count for sketch in full),
            exact_sum(part for sketch in full for part in sketch.sum_parts),
            min(sketch.low for sketch in full),
            max(sketch.high for sketch in full),
            array("h", keys),
            counts_array(list(map(counts.__getitem__, keys))),
            tick,
            array("d", map(weights.__getitem__, keys)),
            (exact_sum(recent_sums) or (0.0,))[0],
        )

    @property
    def lifetime(self) -> Distribution:
        """Every value since the start."""
        return Distribution(self._lifetime)

    @property
    def recent(self) -> Distribution:
        """The same with weights that fall by e^(-0.015·t), as of the newest value."""
        return Distribution(self._recent)

    def _lifetime(self) -> Bins:
        compacted = self.compacted()
        total = compacted.sum_parts[0] if compacted.sum_parts else 0.0
        return Bins(compacted.keys, compacted.counts, total, compacted.low, compacted.high)

    def _recent(self) -> Bins:
        compacted = self.compacted()
        keys = array("h", compress(compacted.keys, compacted.weights))
        weights = array("d", filter(None, compacted.weights))
        noticed = [key for key, weight in zip(keys, weights) if weight >= _RECENT]
        low, high = compacted.low, compacted.high
        if noticed:  # a centre may be beyond the exact extreme in the same bin
            least, most = (min(max(bin_value(key), low), high) for key in (noticed[0], noticed[-1]))
            low = low if bin_key(low) == noticed[0] else least
            high = high if bin_key(high) == noticed[-1] else most
        return Bins(keys, weights, compacted.recent_sum, low, high)


def counts_array(counts: list[int]) -> array[int]:
    """Return ``counts`` in the narrowest array that holds them."""
    for typecode in "HI":
        with suppress(OverflowError):
            return array(typecode, counts)
    return array("Q", counts)


EMPTY = Sketch()
