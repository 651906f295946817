"""tapes.sketch: bins, both views, merging."""

from __future__ import annotations

import math
import statistics
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapes.sketch import EMPTY, PENDING, Sketch


@given(
    st.one_of(st.floats(-1e300, 1e300), st.integers(-(10**40), 10**40)),
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), min_size=1, max_size=4),
)
def test_a_constant_stream_is_exact_in_every_answer(value, batches):
    """Answers are clamped to the exact extremes, so a constant comes back to the digit."""
    sketch, tick = EMPTY, 0
    for times, idle in batches:
        tick += idle
        sketch = sketch.fold([value] * times, tick)
    for view in (sketch.lifetime, sketch.recent):
        answers = {view.min, view.max, view.mean, *(view.quantile(q / 100) for q in range(101))}
        assert answers == {float(value)}
        assert view.stddev == 0.0


@given(
    st.lists(st.tuples(st.integers(-256, 256), st.integers(1, 9)), min_size=1, max_size=30),
    st.sampled_from([0, 20, 40]),
)
def test_whole_numbers_up_to_256_are_exact_in_every_answer(groups, doublings):
    """They are their own centres, so every answer is that of the values themselves, 2^40 of each too."""
    values = sorted(value for value, times in groups for _ in range(times))
    sketch, times = EMPTY.fold(values, 0), 2**doublings
    for _ in range(doublings):
        sketch = Sketch.merge([sketch, sketch])
    view = sketch.lifetime
    assert (view.count, view.sum) == (len(values) * times, sum(values) * times)
    assert view.bins() == [(value, values.count(value) * times) for value in sorted(set(values))]
    assert view.mean == pytest.approx(statistics.mean(values), rel=1e-12)
    assert view.stddev == pytest.approx(statistics.pstdev(values), rel=1e-12, abs=1e-9)
    for percent in range(101):
        rank = max(1, -(-percent * len(values) // 100))
        assert view.quantile(percent / 100) == values[rank - 1]
    for x in (*values, -257, 257, math.inf, -math.inf, 0.5, -0.5):
        assert view.count_below(x) == sum(value <= x for value in values) * times


def test_counts_are_whole_numbers_of_any_size_that_is_met():
    """Beyond 65,535 and beyond 2^32 in one bin, up to 2^63, beside a bin of one."""
    sketch = EMPTY.fold([3.0], 0)
    for power in range(64):
        assert sketch.lifetime.bins() == [(3.0, 2**power)]
        both = Sketch.merge([EMPTY.fold([1.0, 5.0], 0), sketch]).fold([1.0], 0)
        assert both.lifetime.bins() == [(1.0, 2), (3.0, 2**power), (5.0, 1)]
        sketch = Sketch.merge([sketch, sketch]) if power < 63 else sketch


def test_an_empty_sketch_answers_zero():
    """Every answer of an empty sketch is zero, and none is an error."""
    for view in (EMPTY.lifetime, EMPTY.recent):
        assert (view.count, view.sum, view.min, view.max, view.mean, view.stddev) == (0, 0, 0, 0, 0, 0)
        assert view.quantile(0.5) == 0.0
        assert view.fraction_below(1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "5", None, 1 + 2j])
def test_a_bad_value_spoils_nothing(bad):
    """A batch with a value that is no finite number is refused whole."""
    sketch = EMPTY.fold([1.0, 2.0], 0)
    with pytest.raises((TypeError, ValueError)):
        sketch.fold([3.0, bad], 0)
    assert sketch.count == 2


def test_a_value_below_the_least_is_refused_and_the_least_itself_is_not():
    """A fold with a least value accepts that value, and refuses anything below it."""
    sketch = EMPTY.fold([0.0, 2.0], 0, least=0.0)
    assert (sketch.count, sketch.low) == (2, 0.0)
    with pytest.raises(ValueError, match="a value is less than 0"):
        sketch.fold([1.0, -1e-9], 0, least=0.0)


def test_a_hostile_nan_does_not_pass_as_zero():
    """A NaN whose bits would carry into the next lane is refused too."""
    (nan,) = struct.unpack("<d", b"\xff" * 8)
    with pytest.raises(ValueError, match="finite"):
        EMPTY.fold([nan, 1.0], 0)


def test_a_threshold_includes_its_whole_bin():
    """Values at or below a threshold always count; values 0.8 % above it never do."""
    view = EMPTY.fold([1.0, 2.0, 3.0, 3.04, -1.0], 0).lifetime
    assert view.count_below(3.0) == 4
    assert view.count_below(2.999 * 0.99) == 3
    assert view.fraction_below(-1.0) == 0.2
    assert view.count_below(-2.0) == 0
    assert view.count_below(99.0) == 5


def test_a_threshold_in_the_bin_of_the_maximum_counts_that_bin():
    """What is at or below it always counts, also if the maximum is just above it."""
    view = EMPTY.fold([0.5, 1.0, 1.001], 0).lifetime
    assert view.count_below(1.0) == 3
    assert view.count_below(0.9) == 1
    assert view.fraction_below(1.0005) == 1.0


def test_nothing_is_at_or_below_a_threshold_below_the_minimum():
    """Nothing is at or below a threshold under the exact minimum, not even in its bin."""
    view = EMPTY.fold([1.001, 1.002], 0).lifetime
    assert (view.count_below(1.0), view.count_below(1.001)) == (0, 2)


def test_recent_weights_fall_by_dropwizards_alpha():
    """After t seconds a value weighs e^(-0.015·t)."""
    sketch = EMPTY.fold([1.0], 0).fold([2.0], 12)
    assert sketch.recent.bins() == [(1.0, pytest.approx(math.exp(-0.015 * 60))), (2.0, 1.0)]


def test_a_batch_of_an_earlier_tick_counts_in_the_newest():
    """A clock that steps back makes nothing older, nor younger."""
    sketch = EMPTY.fold([1.0], 12).fold([2.0], 3)
    assert sketch.tick == 12
    assert sketch.recent.bins() == [(1.0, 1.0), (2.0, 1.0)]


@pytest.mark.parametrize("outlier", [1000.5, 0.0011])
def test_one_value_is_a_recent_extreme_for_five_minutes_and_weighs_for_38(outlier):
    """To the tick: 0.01 is between 61 and 62 ticks, 1e-15 between 460 and 461."""
    extreme = EMPTY.fold([outlier], 0).fold([0.9, 1.1], 61).recent
    assert (extreme.min, extreme.max) == (min(0.9, outlier), max(1.1, outlier))
    noticed = EMPTY.fold([outlier], 0).fold([0.9, 1.1], 62).recent
    assert (noticed.min, noticed.max) == pytest.approx((0.9, 1.1), rel=0.004)
    assert len(noticed.bins()) == 3
    assert noticed.count_below(noticed.max) == noticed.count
    assert len(EMPTY.fold([outlier], 0).fold([0.9, 1.1], 460).recent.bins()) == 3
    assert len(EMPTY.fold([outlier], 0).fold([0.9, 1.1], 461).recent.bins()) == 2


def test_a_mean_is_exact_where_all_values_are_at_the_edges_of_their_bins():
    """The mean is exact although bins are off by 0.39 %, as it comes from the sum."""
    for values in ([1.0038, 1.0039, 1.0039], [-1.0038, -1.0039, -1.0039], [1.00391, 1.0117, 1.00391]):
        sketch = EMPTY.fold(values, 0)
        for view in (sketch.lifetime, sketch.recent):
            assert view.mean == pytest.approx(statistics.mean(values), rel=1e-12)


def test_merged_sums_of_the_largest_numbers_stay_finite():
    """A sum that only merging takes beyond the range of floats stays at the largest, of either sign."""
    for sign in (1.0, -1.0):
        one = EMPTY.fold([sign * 1.7e308], 0)
        both = Sketch.merge([one, one])
        assert both.recent.sum == both.lifetime.sum == sign * sys.float_info.max
        assert both.fold([sign * -1.0], 10_000).recent.mean == sign * -1.0


@pytest.mark.parametrize(
    "values", [[1.0, 1.7e308, 1.7e308, 2.0], [-1.7e308, -(10**308)], [10**308, 10**308, 0.5]]
)
def test_a_batch_whose_sum_is_beyond_the_range_of_floats_is_refused(values):
    """Nothing of such a batch is added, whether the sum or the sum with what came before is too large."""
    with pytest.raises((ValueError, OverflowError)):
        EMPTY.fold(values, 0)
    with pytest.raises((ValueError, OverflowError)):
        EMPTY.fold(values[:1], 0).fold([values[1]], 0).fold(values[2:] or [values[0]], 0)


def test_a_recent_sum_beyond_the_range_of_floats_is_refused():
    """A value that takes only the recent sum beyond the range of floats is refused too."""
    sketch = EMPTY.fold([-1.7e308], 0).fold([1.7e308], 100_000)
    assert (sketch.lifetime.sum, sketch.recent.sum) == (0.0, 1.7e308)
    with pytest.raises(ValueError, match="beyond the range"):
        sketch.fold([1e308], 100_000)
    assert sketch.fold([1e306], 100_000).recent.sum == 1.7e308 + 1e306


def test_a_tick_of_many_values_takes_bounded_memory():
    """Within a tick, pending keys and parts of the sum take bounded memory without any reader."""
    sketch = EMPTY
    for turn in range(200):
        sketch = sketch.fold([float(1 + (turn * 256 + n) % 3000) for n in range(256)], 0)
        assert len(sketch.pending) <= PENDING + 2 * len(sketch.fresh_keys) + 256
        assert len(sketch.sum_parts) < 100
    assert sketch.compacted().compacted() == sketch.compacted()
    assert sum(sketch.compacted().counts) == 200 * 256


def test_the_recent_view_forgets_and_the_lifetime_does_not():
    """An hour later an outlier is gone from the recent extremes and quantiles."""
    sketch = EMPTY.fold([1000.0], 0).fold([1.0] * 10, 720)
    assert (sketch.recent.max, sketch.recent.quantile(1.0)) == (1.0, 1.0)
    assert (sketch.lifetime.max, sketch.lifetime.quantile(1.0)) == (1000.0, 1000.0)


def test_a_day_of_silence_keeps_what_was_last_known():
    """Time alone changes nothing; a merge with a newer stream lets the older fade to nothing."""
    silent = EMPTY.fold([5.0], 0)
    assert silent.recent.quantile(0.5) == 5.0
    merged = Sketch.merge([silent, EMPTY.fold([1.0], 17280)])
    assert merged.recent.bins() == [(1.0, 1.0)]
    assert merged.lifetime.count == 2


@pytest.mark.parametrize("q", [50, 1.0000001, -0.01, math.nan])
def test_a_bad_quantile_is_refused(q):
    """A quantile is a fraction, not a percentage."""
    with pytest.raises(ValueError, match=rf"^a quantile: got {q}, expected a number from 0 to 1; 0\.99 is "):
        EMPTY.fold([1.0], 0).lifetime.quantile(q)


@pytest.mark.parametrize("values", [(0.0, 257.0), (1e6, 259.0)])
def test_recent_extremes_in_one_bin_do_not_cross(values):
    """An extreme that is known only by its bin's centre stays on its side of one that is known exactly."""
    first, last = values
    recent = EMPTY.fold([first], 0).fold([last], 800).recent
    assert recent.min <= recent.quantile(0.5) <= recent.max
    assert (recent.min, recent.max) == pytest.approx((last, last), rel=0.004)


@pytest.mark.parametrize("percent", range(101))
def test_both_views_answer_the_nearest_rank(percent):
    """1 to 100: the quantile at p per cent is p, rounding of the product notwithstanding."""
    sketch = EMPTY.fold([float(value) for value in range(1, 101)], 0)
    for view in (sketch.lifetime, sketch.recent):
        assert view.quantile(percent / 100) == max(1, percent)


def test_the_lifetime_mean_is_exact_beyond_the_range_of_the_bins():
    """The lifetime mean is the exact sum divided by the count, also beyond the range of the bins."""
    assert EMPTY.fold([1e100, 1e300], 0).lifetime.mean == 5e299
