"""Numbers to bins: the key of a value, one at a time and a thousand at a time.

Theory. A value is put into the bin of numbers that share its sign, its exponent and the upper seven bits of
its mantissa, rounded to nearest: 128 bins an octave. The upper sixteen bits of an IEEE 754 single (known as
bfloat16) are just that, so the bin's key is a bit pattern that the machine computes. All values of a bin
become its centre, which is off by at most half a bin: 2^-8 = 0.39 % at the bottom of an octave, less above.
Whole numbers up to 256 have eight significant bits or fewer and are their own centres: they are exact.
Magnitudes from 1e-30 to 1e30 are well inside the range of a single (1e-38 to 3e38); what is larger counts in
the outermost bin, and what is too small for a single counts as zero.

The key is the pattern read as a number, negated for negative values, so keys sort as their values do and
both zeros are key 0.

A batch is rounded in one addition: its singles, laid side by side, are one big integer, and adding 0x8000 to
every 32-bit lane rounds every lane to its upper half. No lane carries into the next, as the pattern of a
finite or infinite single is at most 0x7F800000 without its sign. Whether all keys of a batch lie between two
others is seen likewise: with every sign bit clear, adding ``0x8000 - k`` to the upper half of every lane sets
its sign bit where the key is ``k`` or more, and carries nowhere. A batch between the extremes known so far
needs no search for new ones.

PyPy compiles the plain loop to better code than its big integers have, so it uses the loop. Both give the
same keys, and tests check that.

Source: the bins are those of HDR histograms and of DDSketch's linear interpolation, at a fixed precision.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache
from math import inf, ldexp
from struct import error, pack, unpack

from tapes.sums import Number

MAX_KEY = 0x7F7F
"""The key of the outermost bin, about 3.4e38; the outermost negative bin has ``-MAX_KEY``."""

_OUTERMOST = 3.38e38
"""A value below it has a key of at most `MAX_KEY` without correction."""
_NEGATIVE_ZERO = -0x8000

_LARGEST = 2.0**128 - 2.0**104
"""The largest single."""
_MANY = 32
"""Minimum number of values for which the check of extremes saves time."""

_Binned = tuple["array[int]", float, float]

_UPPER_HALVES = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)


@lru_cache(maxsize=64)
def _lanes(size: int, pattern: int) -> int:
    """Return ``pattern`` in each of ``size`` 32-bit lanes, as one integer."""
    return int.from_bytes(pack("I", pattern) * size, sys.byteorder)


@lru_cache(maxsize=256)
def _limits(size: int, low: float, high: float) -> tuple[int, int, int]:
    """Return all sign bits, and what sets them where a key is above that of ``low``, not below ``high``'s."""
    signs, ones = _lanes(size, 0x80000000), _lanes(size, 0x10000)
    return signs, signs - (bin_key(low) + 1) * ones, signs - bin_key(high) * ones


def _keys_at_once(values: Sequence[Number], low: float, high: float) -> _Binned:
    size = len(values)
    lanes = int.from_bytes(pack(f"{size}f", *values), sys.byteorder) + _lanes(size, 0x8000)
    keys = array("h", lanes.to_bytes(4 * size, sys.byteorder))[_UPPER_HALVES]
    if size >= _MANY and 0 < low <= high:
        signs, past_low, to_high = _limits(size, low, high)
        if not lanes & signs and not (lanes + to_high) & signs:
            if (lanes + past_low) & signs != signs:
                low = float(min(low, min(values)))
            return keys, low, high
    lowest, highest = min(values), max(values)
    if highest >= _OUTERMOST or lowest < 0 or (lowest == 0 and _NEGATIVE_ZERO in keys):
        keys = array("h", [_key_of_pattern(key & 0xFFFF) for key in keys])
    return keys, min(low, float(lowest)), max(high, float(highest))


def _keys_one_by_one(values: Sequence[Number], low: float, high: float) -> _Binned:
    keys = array("h", bytes(2 * len(values)))
    for index, value in enumerate(values):
        (single,) = unpack("I", pack("f", value))
        keys[index] = _key_of_pattern((single + 0x8000) >> 16)
    return keys, min(low, float(min(values))), max(high, float(max(values)))


def _key_of_pattern(pattern: int) -> int:
    magnitude = min(pattern & 0x7FFF, MAX_KEY)
    return magnitude if pattern < 0x8000 else -magnitude


_keys = _keys_one_by_one if sys.implementation.name == "pypy" else _keys_at_once


def bin_keys(values: Sequence[Number], low: float = inf, high: float = -inf) -> _Binned:
    """Return the key of every value, one at least, and the extremes of ``values``, ``low`` and ``high``.

    The result is meaningless if a value is not finite. Raises `TypeError` if one is not a number.
    """
    try:
        return _keys(values, low, high)
    except (OverflowError, error):  # too large for a single, or no number: which one depends on the version
        clamped = [max(-_LARGEST, min(value, _LARGEST)) for value in values]
    try:
        keys, _, _ = _keys(clamped, inf, -inf)
    except error as no_number:
        raise TypeError(str(no_number)) from None
    return keys, min(low, float(min(values))), max(high, float(max(values)))


@lru_cache(maxsize=4096)
def bin_key(value: Number) -> int:
    """Return the key of the bin that a finite ``value`` falls into."""
    ((key,), _, _) = bin_keys([value])
    return key


@lru_cache(maxsize=4096)
def bin_value(key: int) -> float:
    """Return the centre of the bin ``key``."""
    magnitude = abs(key)
    exponent, mantissa = magnitude >> 7, magnitude & 0x7F
    value = ldexp(mantissa | 0x80, exponent - 134) if exponent else ldexp(mantissa, -133)
    return value if key >= 0 else -value
