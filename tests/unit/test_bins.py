"""tapes.bins: from values to keys and back."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapes import bins
from tapes.bins import MAX_KEY, bin_key, bin_keys, bin_value


@pytest.mark.parametrize("value", [*range(-256, 257), 1024, -(2.0**-20), 0.5, 0.375])
def test_whole_numbers_and_short_fractions_are_their_own_centres(value):
    """Whole numbers up to 256, and all numbers of eight significant bits, are exact."""
    assert bin_value(bin_key(value)) == value


@pytest.mark.parametrize("exponent", range(-30, 31))
@pytest.mark.parametrize("sign", [1, -1])
def test_a_centre_is_within_four_per_mille(exponent, sign):
    """From 1e-30 to 1e30 and for both signs a bin's centre is off by 0.4 % at most."""
    for step in range(200):
        value = sign * (1 + step * 0.045) * 10.0**exponent
        assert bin_value(bin_key(value)) == pytest.approx(value, rel=0.004)


def test_keys_ascend_with_values():
    """A larger value never has a smaller key, across zero and both signs."""
    values = [0.0, *(sign * 1.37**power for power in range(-200, 200) for sign in (1, -1))]
    keys = [bin_key(value) for value in sorted(values)]
    assert keys == sorted(keys)


def test_every_bin_holds_its_own_centre():
    """Key to centre to key, and centres ascend with their keys: all bins of both signs."""
    every = range(-MAX_KEY, MAX_KEY + 1)
    centres = [bin_value(key) for key in every]
    assert list(bin_keys(centres)[0]) == list(every)
    assert centres == sorted(centres)


@pytest.mark.parametrize(
    ("value", "key"),
    [(1e39, MAX_KEY), (-1e300, -MAX_KEY), (3.4e38, MAX_KEY), (10**39, MAX_KEY), (-(10**308), -MAX_KEY)],
    ids="{:.3g}".format,
)
def test_what_is_beyond_the_range_counts_in_the_outermost_bin(value, key):
    """Finite values that a single can't hold are not lost."""
    assert bin_key(value) == key
    assert bin_value(key) == math.copysign(255 * 2.0**120, value)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-60, -1e-60])
def test_both_zeros_and_what_is_too_small_are_zero(value):
    """Negative zero has no bin of its own."""
    assert bin_key(value) == 0
    assert math.copysign(1.0, bin_value(0)) == 1.0


def test_a_whole_number_beyond_a_single_takes_no_other_value_along():
    """Whole numbers up to the range of a float, in one batch: all keys and extremes are right."""
    values = [1.0, 10**39, 2, -(10**308), 2**128, 0.5]
    keys, low, high = bin_keys(values)
    assert list(keys) == [bin_key(1.0), MAX_KEY, bin_key(2), -MAX_KEY, MAX_KEY, bin_key(0.5)]
    assert (low, high) == (-1e308, 1e39)
    assert bin_keys(values, -math.inf, math.inf) == (keys, -math.inf, math.inf)


finite = st.floats(allow_nan=False, allow_infinity=False)
whole = st.one_of(st.integers(-(10**30), 10**30), st.integers(-(10**308), 10**308))


@given(st.lists(st.one_of(finite, whole), min_size=1, max_size=50))
def test_both_ways_of_computing_keys_agree(values):
    """The big addition and the plain loop give the same key for every value, on every interpreter."""
    largest = 2.0**128 - 2.0**104
    clamped = [max(-largest, min(value, largest)) for value in values]
    at_once = bins._keys_at_once(clamped, math.inf, -math.inf)
    assert at_once == bins._keys_one_by_one(clamped, math.inf, -math.inf)
    keys, low, high = bin_keys(values)
    assert keys == at_once[0]
    assert list(keys) == [bin_key(value) for value in values]
    assert (low, high) == (float(min(values)), float(max(values)))
    assert {type(extreme) for extreme in (low, high, *at_once[1:])} == {float}


@given(
    st.lists(st.one_of(finite, whole), min_size=1, max_size=40),
    st.sampled_from(
        [[], [1e39], [-1e300], [10**39, -(10**308)], [3.4028235677973366e38, -3.4028235677973366e38]]
    ),
)
def test_a_struct_that_refuses_what_a_single_cannot_hold_changes_nothing(values, beyond):
    """Native packing makes it infinite, standard packing raises: the same keys and extremes."""
    values, known = [*values, *beyond], (-1e301, 1e301)
    expected, expected_known = bin_keys(values), bin_keys(values, *known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bins, "pack", lambda layout, *numbers: struct.pack(f"={layout}", *numbers))
        got, got_known = bin_keys(values), bin_keys(values, *known)
    assert (got, got_known) == (expected, expected_known)
    assert {type(extreme) for extreme in got[1:]} == {float}


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=32, max_size=80),
    st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)),
    st.sampled_from([1.0, 0.0, -0.0, -1.0, 1e-3, 1e3, 1e39]),
)
def test_known_extremes_change_neither_keys_nor_new_extremes(values, known, odd):
    """Known extremes change no key and no new extreme, whether a batch is within them or not."""
    values = [*values, odd, *known]
    low, high = min(known), max(known)
    keys, least, most = bin_keys(values, low, high)
    assert list(keys) == [bin_key(value) for value in values]
    assert (least, most) == (min(low, *values), max(high, *values))
    inside = [value for value in values if low <= value <= high]
    assert bin_keys(inside * 20, low, high) == (bin_keys(inside * 20)[0], low, high)


@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**30])
@pytest.mark.parametrize("low", [1.0, 0.9985, 1.0038])
@pytest.mark.parametrize("high", [600.0, 598.1, 601.9])
def test_a_batch_within_the_known_bins_is_answered_as_any_other(scale, low, high):
    """A batch within the known bins gives the same keys, also with one value below, above or between them."""
    many = [2.0 + 8.37 * step for step in range(60)]
    low, high, sizes = low * scale, high * scale, [0.0, 1e-60, 1e-3, 0.99, 0.9981, 0.999, 1.0, 1.003, 1.0037]
    sizes += [1.0039, 1.0041, 1.5, 300.0, 597.9, 598.05, 598.5, 599.0, 600.0, 601.0, 601.95, 602.1, 1e3, 1e25]
    for odd in (sign * size for size in sizes for sign in (1, -1)):
        values = [value * scale for value in (*many, odd, 2.5)]
        keys, least, most = bin_keys(values, low, high)
        assert list(keys) == [bin_key(value) for value in values]
        assert (least, most) == (min(low, *values), max(high, *values))


@pytest.mark.parametrize("pattern", [0x3F800000, 0x3F808000, 0x3F807FFF, 0x3F818000, 0x7F7F7FFF, 0x00008000])
def test_a_single_is_rounded_to_the_nearer_bin_and_ties_away_from_zero(pattern):
    """At the boundary itself, just below it, and where a mantissa carries into the exponent."""
    value = math.ldexp(pattern & 0x7FFFFF | 0x800000, (pattern >> 23) - 150) if pattern >> 23 else 2.0**-134
    expected = (pattern + 0x8000) >> 16
    assert bin_key(value) == expected
    assert bin_key(-value) == -expected
    assert list(bins._keys_one_by_one([value, -value], 0.0, 0.0)[0]) == [expected, -expected]


def test_no_number_is_no_key():
    """An object that is no number is refused."""
    with pytest.raises(TypeError):
        bin_keys([1.0, "2"])
