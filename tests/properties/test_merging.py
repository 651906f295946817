"""Merging is commutative and associative, and loses nothing."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapes.ewma import Rates
from tapes.sketch import EMPTY, Sketch
from tapes.sums import Total, exact_sum

finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)
batches = st.lists(st.tuples(st.lists(finite, min_size=1, max_size=30), st.integers(0, 50)), max_size=8)
numbers = st.one_of(finite, st.integers(-(10**20), 10**20))


def folded(batch):
    values, tick = batch
    return EMPTY.fold(values, tick)


@given(st.lists(finite, max_size=40), st.randoms())
def test_an_exact_sum_does_not_depend_on_the_order(values, rng):
    """Any order, and any grouping, gives the same parts; the first is the correctly rounded sum."""
    shuffled = values[:]
    rng.shuffle(shuffled)
    cut = len(values) // 3
    grouped = exact_sum(exact_sum(values[:cut]) + exact_sum(values[cut:]))
    assert exact_sum(values) == exact_sum(shuffled) == grouped
    assert (exact_sum(values) or (0.0,))[0] == math.fsum(values)


@given(st.lists(st.lists(numbers, max_size=10), max_size=6))
def test_totals_merge_to_the_total_of_all(groups):
    """Whole numbers stay whole; the merged total is that of one stream."""
    merged = Total.merge(Total().add(group) for group in groups)
    together = Total().add([number for group in groups for number in group])
    assert merged == together
    if all(isinstance(number, int) for group in groups for number in group):
        assert merged.value == sum(number for group in groups for number in group)


def test_sums_beyond_the_range_on_the_way_come_back():
    """Only a sum that is itself too large stays at the largest float."""
    assert exact_sum([1e308, 1e308, -1e308, -1e308]) == ()
    assert exact_sum([1e308, 1e308, -1e308, 3.0]) == (1e308, 3.0)
    assert exact_sum([1e308, 1e308]) == (sys.float_info.max,)
    assert exact_sum([-1e308, -1e308]) == (-sys.float_info.max,)


def test_large_whole_numbers_stay_exact_beside_fractions():
    """2^53 + 1 is no float, but its sum with 1.0 is."""
    assert Total().add([2**53 + 1]).add([1.0]).value == 2.0**53 + 2
    assert Total(10**400, (0.5,)).value == sys.float_info.max


@given(batches, st.randoms())
def test_sketches_merge_in_any_order_and_grouping(parts, rng):
    """Counts, bins, extremes and sums exactly, recent weights within 1e-12."""
    sketches = [folded(part) for part in parts]
    shuffled = sketches[:]
    rng.shuffle(shuffled)
    cut = len(sketches) // 2
    grouped = Sketch.merge([Sketch.merge(sketches[:cut]), Sketch.merge(sketches[cut:])])
    merged = Sketch.merge(sketches)
    for other in (Sketch.merge(shuffled), grouped):
        assert (other.keys, other.counts) == (merged.keys, merged.counts)
        assert (other.count, other.sum_parts, other.tick) == (merged.count, merged.sum_parts, merged.tick)
        assert (other.low, other.high) == (merged.low, merged.high)
        assert list(other.weights) == pytest.approx(list(merged.weights), rel=1e-12, abs=1e-12)


@given(batches)
def test_folding_one_after_the_other_is_merging(parts):
    """A stream folded in pieces has the bins, the count and the sum of its merged pieces."""
    one = EMPTY
    for values, tick in sorted(parts, key=lambda part: part[1]):
        one = one.fold(values, tick)
    one = one.settled()
    merged = Sketch.merge(map(folded, parts))
    assert one[:6] == merged[:6]
    assert sum(one.counts) == one.count == sum(len(values) for values, _ in parts)


@given(batches, st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_quantiles_are_monotone_and_between_the_extremes(parts, quantiles):
    """min ≤ quantile(q) ≤ max, ascending in q, for both views."""
    sketch = Sketch.merge(map(folded, parts))
    for view in (sketch.lifetime, sketch.recent):
        answers = [view.quantile(q) for q in sorted(quantiles)]
        assert answers == sorted(answers)
        assert all(view.min <= answer <= view.max for answer in answers)


marks = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 100)), max_size=30)


@given(marks, st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_rates_of_workers_are_the_rate_of_one_that_saw_all(events, starts):
    """Whatever the starts and bursts, merged rates are those of the merged stream."""
    workers = {worker: Rates.started(start) for worker, start in enumerate(starts)}
    one = Rates.started(min(starts))
    for worker, tick, count in sorted(events, key=lambda event: event[1]):
        if tick >= starts[worker]:
            workers[worker] = workers[worker].mark(count, tick)
            one = one.mark(count, tick)
    merged = Rates.merge(workers.values())
    for tick in (40, 41, 100):
        assert merged.read(tick) == pytest.approx(one.read(tick), rel=1e-12, abs=1e-12)
