"""Sums that do not depend on the order of addition.

Theory. Floating-point addition rounds, so ``(a + b) + c`` and ``a + (b + c)`` differ in the last digits,
and a sum merged over workers would depend on who reported first. The exact sum of floats is a real number
that can always be written as a short list of floats, each the correctly rounded remainder after those
before it. That list depends on the exact sum alone, so merging lists is commutative and associative, and
its first element is the correctly rounded total. ``math.fsum`` rounds correctly, hence one call yields one
element; sums of measurements need two elements, rarely three.

Source: J. R. Shewchuk, "Adaptive Precision Floating-Point Arithmetic and Fast Robust Geometric
Predicates", 1997 (expansions); ``math.fsum`` for the rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from fractions import Fraction
from math import fsum, isfinite, ulp
from typing import NamedTuple

_MAX_FLOAT = sys.float_info.max
_FLOAT_DIGITS = 2.0**53
LARGE = 1e308
"""A number between it and its negative is finite. A sum of positive numbers below it has only finite ones."""
LIMIT = 2.0**63
"""The totals of one process are smaller; merged over workers they may be larger."""
MAX_STEP = 1 << 53
"""Maximum that one call adds to a total: a float can hold every whole number up to it."""
SUM_TOO_LARGE = "the sum would be beyond the range of floats"

Number = int | float


def exact_sum(values: Iterable[Number]) -> tuple[float, ...]:
    """Return the exact sum of ``values``, taken as floats, as its canonical list; empty for zero.

    A sum beyond the range of floats, as only one merged over workers can be, stays at the largest float.
    Raises `ValueError` or `TypeError` if a value is NaN, infinite, or no number.
    """
    rest = list(values)
    parts: list[float] = []
    try:
        while True:
            part = fsum(rest)
            if part == 0.0:
                return tuple(parts)
            if not isfinite(part):
                raise ValueError("a value is not finite")
            parts.append(part)
            rest.append(-part)
    except OverflowError:  # perhaps only on the way
        exact = sum(map(Fraction, rest), Fraction(0))
    if abs(exact) > _MAX_FLOAT:
        return (_MAX_FLOAT if exact > 0 else -_MAX_FLOAT,)
    while exact:
        parts.append(float(exact))
        exact -= Fraction(parts[-1])
    return tuple(parts)


def check_sum(parts: tuple[float, ...], values: list[Number]) -> None:
    """Raise `ValueError` if ``values``, alone or with ``parts``, add up beyond the range of floats."""
    try:
        fsum(values)
        fsum((*parts, *values))
    except OverflowError:
        raise ValueError(SUM_TOO_LARGE) from None


def sum_of_batch(values: list[Number], low: Number) -> tuple[float, ...]:
    """Return numbers that add up exactly to the sum of ``values``, none of which is below ``low``.

    It needs two passes where `exact_sum` needs three. Positive floats are whole multiples of the unit in the
    last place of the least of them, and so is what rounding leaves of their sum; with less than 2^53 such
    units left, the rest is a float, and the second pass finds it exactly. The numbers are not canonical.
    Raises as `exact_sum`, or `OverflowError`.
    """
    near = sum(values) if low > 0 else 0.0
    if 0.0 < near < LARGE:
        near = float(near)
        rest = fsum([*values, -near])
        if abs(rest) < ulp(low) * _FLOAT_DIGITS:
            return (near, rest)
    return exact_sum(values)


class Total(NamedTuple):
    """An exact sum of numbers: whole numbers apart, so that counts stay ``int`` of any size."""

    whole: int = 0
    parts: tuple[float, ...] = ()

    @property
    def value(self) -> Number:
        """The sum: an ``int`` as long as nothing fractional was added."""
        if not self.parts:
            return self.whole
        near = float(self.whole)  # and below 2^106 the rest is a float too
        return fsum((near, float(self.whole - int(near)), *self.parts))

    def add(self, values: list[Number]) -> Total:
        """Return this total with finite ``values`` added."""
        total = sum(values)
        if type(total) is int:
            return Total(self.whole + total, self.parts)
        whole = sum(value for value in values if isinstance(value, int))
        floats = (value for value in values if not isinstance(value, int))
        return Total(self.whole + whole, exact_sum((*self.parts, *floats)))

    @staticmethod
    def merge(totals: Iterable[Total]) -> Total:
        """Return the sum of ``totals``, the same for any order."""
        whole = 0
        parts: list[float] = []
        for total in totals:
            whole += total.whole
            parts += total.parts
        return Total(whole, exact_sum(parts) if parts else ())
