"""Merging is commutative and associative, and loses nothing."""

from __future__ import annotations

import itertools
import math
import sys
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tapes
from tapes.ewma import Rates
from tapes.metrics import KINDS, MERGE_MODES, GaugeState
from tapes.sketch import EMPTY, Sketch
from tapes.sums import Total, exact_sum, sum_of_batch
from tapes.testing import ManualClock

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


sizes = st.one_of(st.floats(5e-324, 1e300), st.floats(5e-324, 1e-300), st.integers(1, 10**20), st.just(0))


@given(st.lists(sizes, min_size=1, max_size=40))
@example([2.0**53, 1.5, 2.0**-60])  # the rest is below zero and no float
@example([2**53, 1])
def test_the_sum_of_a_batch_is_exact(values):
    """Also of subnormal numbers, of zeros, of large whole ones, and where they span hundreds of decades."""
    parts = sum_of_batch(values, min(values))
    assert sum(map(Fraction, parts)) == sum(Fraction(float(value)) for value in values)


@given(st.lists(st.lists(numbers, max_size=10), max_size=6))
def test_totals_merge_to_the_total_of_all(groups):
    """Whole numbers stay whole; the merged total is that of one stream."""
    merged = Total.merge(Total().add(group) for group in groups)
    together = Total().add([number for group in groups for number in group])
    one = Total()
    for group in groups:
        one = one.add(group)
    assert merged == together == one
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
    assert Total(10**31 - 1, (0.5,)).value == 1e31
    assert Total(-(2**53), (2.0**53,)).value == 0.0


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
    one = one.compacted()
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


steps = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(st.one_of(st.just(1), st.integers(0, 300), st.floats(0, 300)), min_size=1, max_size=3),
        st.booleans(),
        st.integers(0, 9),
    ),
    max_size=20,
)


def plain(numbers):
    """Return the sum of ``numbers``, rounded once."""
    return float(sum(map(Fraction, numbers)))


@given(steps)
def test_metrics_of_workers_merge_to_those_of_one_that_saw_all(steps):
    """All kinds but gauges, however often they were read on the way, and both are what plain sums give."""
    clock = ManualClock(1000.0)
    registries = [tapes.Registry(clock=clock) for _ in range(4)]
    kinds = ["counter", "meter", "histogram", "timer"]
    metrics = [[getattr(registry, kind)("m" + kind) for kind in kinds] for registry in registries]
    rates, seen, taken = Rates.started(200), [], []
    for worker, given_numbers, is_read, seconds in steps:
        for number in given_numbers:
            for counter, meter, histogram, timer in (metrics[worker], metrics[3]):
                counter.increment(number)
                meter.mark(number)
                histogram.update(-number)
                timer.update(number)
            seen.append(number)
            rates = rates.mark(number, int(clock() // 5))
        if is_read:
            for counter, *_ in (metrics[worker], metrics[3]):
                counter.decrement(given_numbers[0])
            taken.append(given_numbers[0])
            for metric in itertools.chain.from_iterable(metrics):
                metric.collect()
        clock.advance(seconds)
    tick = int(clock() // 5)
    series = []
    for kind, one, *workers in zip(kinds, metrics[3], *metrics[:3]):
        merged = KINDS[kind].merge(metric.collect() for metric in workers).series((), tick)
        alone = one.collect().series((), tick)
        assert merged.fields() == pytest.approx(alone.fields(), rel=1e-9, abs=1e-9)
        series.append(merged)
    counter, meter, histogram, timer = series
    assert (counter.total, counter.decremented) == (plain(seen), any(taken))
    assert counter.value == plain([*seen, *(-number for number in taken)])
    assert isinstance(counter.total, int) or not all(isinstance(number, int) for number in seen)
    assert meter.count == plain(seen)
    created = [one.collect().origin.created for one in metrics[0]]
    assert [one.created for one in series] == created
    assert meter[2:5] == pytest.approx(rates.read(tick), rel=1e-9)
    assert (histogram.count, timer.count) == (len(seen), len(seen))
    assert (histogram.sum, timer.sum) == (-plain(seen), plain(seen))
    extremes = [edge(map(float, seen or [0])) for edge in (min, max)]
    assert [timer.lifetime.min, timer.lifetime.max] == extremes
    assert [-histogram.lifetime.max, -histogram.lifetime.min] == extremes


@given(
    st.sampled_from(MERGE_MODES),
    st.lists(st.one_of(st.none(), st.integers(-99, 99), st.floats(-99, 99)), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.randoms(),
)
def test_gauges_merge_in_any_order_as_the_newest_mode_says(mode, values, are_told, rng):
    """Over those that were ever set and have a value; of others any value stands in, if there is one."""
    times = [float(second) if is_told else None for second, is_told in zip(range(len(values)), are_told)]
    newest = max((time for time in times if time is not None), default=None)
    states = [
        GaugeState(value, mode if time == newest else "max", time) for value, time in zip(values, times)
    ]
    told = [state.value for state in states if state.value is not None and state.since is not None]
    rng.shuffle(states)
    merged = GaugeState.merge(iter(states))
    assert (merged.mode, merged.since) == (mode, newest)
    if not told:
        assert merged.value in (set(values) - {None} or {None})
    else:
        total = sum(map(Fraction, told))
        expected = {"max": max(told), "min": min(told), "mean": total / len(told), "last": told[-1]}
        assert merged.value == pytest.approx(float(expected.get(mode, total)), rel=1e-12)
