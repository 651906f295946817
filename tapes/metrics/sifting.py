"""Bad values: which numbers can be recorded, and how the others are taken out of a batch.

Theory. Recording checks nothing. A fold absorbs a batch as it is and checks it as a whole: its least value,
its sum, the new total. Only a batch that fails is sifted. First each value is checked alone, and numbers of
foreign types are converted. If the good values still fail together, as when they would take a total beyond
its bound, they are absorbed one by one, and each one that fails is bad. The registry counts and logs what is
bad.

If sifting changes nothing, the values were not at fault, and the exception is not theirs: a signal handler
may raise anywhere. Then the batch is absorbed and the exception goes on to the caller.

Bounds. A number is finite, and a `float` can hold its magnitude. One step of a counter, or mark of a meter,
is at most `MAX_STEP`, and the totals of a process stay below `LIMIT`. The sum of a histogram or a timer stays
within the range of floats.
"""

from __future__ import annotations

from math import isfinite
from operator import index, is_
from typing import Any

from tapes.errors import safe_text
from tapes.sums import LIMIT, SUM_TOO_LARGE, Number

NOT_FINITE = "it is not a finite number"
NEGATIVE = "it is less than 0"
TOO_LARGE = "it is more than 2^53"
TOTAL_TOO_LARGE = "the total would reach 2^63"

EXPECTED = {
    NOT_FINITE: "a finite number", NEGATIVE: "zero or more", TOO_LARGE: "2^53 at most",
    TOTAL_TOO_LARGE: "a total below 2^63", SUM_TOO_LARGE: "a sum within the range of floats",
}  # fmt: skip
"""Why a value is bad, and what was expected instead."""

_ARITHMETIC = (ValueError, TypeError, ArithmeticError, Warning)
"""What arithmetic with bad values raises, and foreign numbers where warnings are errors."""


def absorb_sifted(
    metric: Any, state: Any, values: list[Any], error: BaseException
) -> tuple[Any, list[tuple[Any, str]], BaseException | None]:
    """Absorb the good values of a batch that raised ``error``.

    Returns ``state`` with them, the bad values with reasons, and ``error`` if the values are not its cause.
    """
    # 1. Each value alone.
    good, bad, raised = _sift(metric, values)
    # 2. The good ones together.
    try:
        absorbed = metric._absorb(state, good) if good else state
    # 3. One by one, if they fail together.
    except Exception:
        absorbed = state
        for value in good:
            try:
                absorbed = metric._absorb(absorbed, [value])
            except Exception as failure:  # at worst a value is lost, and not the user's request
                why = safe_text(failure) if isinstance(failure, ValueError) else "it could not be folded"
                bad.append((metric._raw(value), why))
    is_unchanged = not bad and all(map(is_, good, values))
    is_theirs = not is_unchanged and (isinstance(error, _ARITHMETIC) or type(error) in raised)
    return absorbed, bad, None if is_theirs else error


def _sift(metric: Any, values: list[Any]) -> tuple[list[Any], list[tuple[Any, str]], set[type]]:
    """Return the values that are good alone, the bad ones with reasons, and what foreign numbers raised."""
    good: list[Any] = []
    bad: list[tuple[Any, str]] = []
    raised: set[type] = set()
    for value in values:
        is_foreign = type(metric._raw(value)) not in (int, float)
        expected: type[BaseException] = BaseException if is_foreign else ValueError
        try:
            good.append(metric._checked(value))
        except expected as error:
            bad.append((metric._raw(value), safe_text(error)))
            if is_foreign:
                raised.add(type(error))
    return good, bad, raised


def checked_number(value: Any) -> Number:
    """Return ``value`` as an ``int`` below `LIMIT` in magnitude or a finite ``float``; raises ValueError."""
    if type(value) in (int, float) and -LIMIT < value < LIMIT:  # which NaN is not
        number: Number = value
        return number
    try:
        finite = isfinite(value)
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(NOT_FINITE)
    try:
        whole = index(value)
    except TypeError:
        return float(value)
    return whole if -LIMIT < whole < LIMIT else float(value)
