"""tapes.sketch: bins, both views, merging."""

from __future__ import annotations

import math
import struct

import pytest

from tapes.sketch import EMPTY, Sketch


def test_a_constant_stream_is_exact_in_every_answer():
    """Answers are clamped to the exact extremes, so a constant comes back to the digit."""
    sketch = EMPTY.fold([0.1] * 1000, 0)
    for view in (sketch.lifetime, sketch.recent):
        answers = {view.min, view.max, view.mean, *(view.quantile(q / 100) for q in range(101))}
        assert answers == {0.1}
        assert view.stddev == 0.0


def test_an_empty_sketch_answers_zero():
    """Empty distributions report zeros, not errors."""
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


def test_a_hostile_nan_does_not_pass_as_zero():
    """A NaN whose bits would carry into the next lane is refused too."""
    (nan,) = struct.unpack("<d", b"\xff" * 8)
    with pytest.raises(ValueError, match="finite"):
        EMPTY.fold([nan, 1.0], 0)


def test_a_threshold_includes_its_whole_bin():
    """What is at or below always counts; what is 0.8 % above never fails to be told apart."""
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


def test_recent_weights_fall_by_dropwizards_alpha():
    """After t seconds a value weighs e^(-0.015·t)."""
    sketch = EMPTY.fold([1.0], 0).fold([2.0], 12)
    assert sketch.recent.bins() == [(1.0, pytest.approx(math.exp(-0.015 * 60))), (2.0, 1.0)]


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


def test_a_bad_quantile_is_refused():
    """A quantile is a fraction, not a percentage."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        EMPTY.lifetime.quantile(50)


@pytest.mark.parametrize("values", [(0.0, 257.0), (1e6, 259.0)])
def test_recent_extremes_in_one_bin_do_not_cross(values):
    """An extreme that is known only by its bin's centre stays on its side of one that is known exactly."""
    first, last = values
    recent = EMPTY.fold([first], 0).fold([last], 800).recent
    assert recent.min <= recent.quantile(0.5) <= recent.max
    assert (recent.min, recent.max) == pytest.approx((last, last), rel=0.004)
