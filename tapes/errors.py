"""Every error that tapes raises, in one tree.

    TapesError
    ├── InvalidName            ValueError        a metric name that can't be used
    ├── InvalidLabel           ValueError        a label name that can't be used
    ├── InvalidArgument        ValueError        any other argument out of its range
    ├── BadValue               ValueError        a value that can't be recorded; raised in tests only
    ├── InvalidCall            TypeError         a call with arguments that are missing or in the wrong place
    ├── UnknownAttribute       AttributeError    a name that a metric or the package does not have
    ├── KindConflict           TypeError         the name belongs to a metric of another kind
    ├── MissingExtra           ImportError       an optional dependency is not installed
    ├── AddressError           ValueError        an address that can't be bound or connected to
    │   └── AddressInUse                         another aggregator serves it already
    ├── AggregatorUnavailable  RuntimeError      the aggregator can't be started, or did not answer in time
    └── WireError              ValueError        a message that is not one of ours

Each has the same four parts in the same order: what is wrong, what was got, what was expected, and what to
do. Each also derives from the built-in exception that a caller who does not know tapes would catch.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AddressError", "AddressInUse", "AggregatorUnavailable", "BadValue", "InvalidArgument", "InvalidCall",
    "InvalidLabel", "InvalidName", "KindConflict", "MissingExtra", "TapesError", "UnknownAttribute",
    "WireError", "safe_text", "short_repr",
]  # fmt: skip

_UNSET: Any = object()


class TapesError(Exception):
    """The root of all errors of tapes.

    Args:
        what: What is wrong, without a full stop.
        got: The offending value; shown through ``repr``.
        expected: What would have been right.
        remedy: What the reader can do now.

    Attributes:
        what, got, expected, remedy: As given; ``got`` is ``None`` where nothing was.
    """

    def __init__(self, what: str, *, got: Any = _UNSET, expected: str = "", remedy: str = "") -> None:
        self.what = what
        self.got = None if got is _UNSET else got
        self.expected = expected
        self.remedy = remedy
        details = []
        if got is not _UNSET:
            details.append(f"got {short_repr(got)}")
        if expected:
            details.append(f"expected {expected}")
        message = what + (": " + ", ".join(details) if details else "")
        super().__init__(message + (f"; {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        state = {**vars(self), "got": _as_sent(self.got)}
        return _received, (type(self), self.args, state)


def _as_sent(value: Any) -> Any:
    """Return ``value`` if it is plain, its repr otherwise: an error can always be pickled."""
    return value if value is None or type(value) in (bool, int, float, str, bytes) else short_repr(value)


def _received(kind: type[TapesError], args: tuple[Any, ...], state: dict[str, Any]) -> TapesError:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


class InvalidName(TapesError, ValueError):
    """A metric name that can't be used."""


class InvalidLabel(TapesError, ValueError):
    """A label name that can't be used."""


class InvalidArgument(TapesError, ValueError):
    """An argument other than a name or a label that is out of its range."""


class InvalidCall(TapesError, TypeError):
    """A call with arguments that are missing or in the wrong place."""


class UnknownAttribute(TapesError, AttributeError):
    """A name that a metric or the package does not have."""

    def __init__(self, what: str, *, attribute: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(what, expected=expected, remedy=remedy)
        self.name = attribute  # so that Python adds no suggestion of its own


class BadValue(TapesError, ValueError):
    """A value that can't be recorded; dropped, counted and logged, but raised by `tapes.testing.strict`."""


class KindConflict(TapesError, TypeError):
    """The name belongs to a metric of another kind, or would hide a field of one."""


class MissingExtra(TapesError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs packages that are not installed",
            remedy=f"run: pip install 'tapes[{extra}]' (in a checkout: pip install '.[{extra}]')",
        )


class AddressError(TapesError, ValueError):
    """An address that can't be bound or connected to."""


class AddressInUse(AddressError):
    """Another aggregator serves this address already."""


class AggregatorUnavailable(TapesError, RuntimeError):
    """The aggregator can't be started, or did not answer in time."""


class WireError(TapesError, ValueError):
    """A message that is not one of ours."""


def short_repr(value: Any) -> str:
    """Return the ``repr`` of a value, 120 characters at most; never raises."""
    try:
        text = repr(value)
    except Exception:  # a broken __repr__ must not hide the error that is being reported
        text = f"<{type(value).__name__} with a failing repr>"
    return text if len(text) <= 120 else text[:117] + "..."


def safe_text(error: BaseException) -> str:
    """Return the message of an exception; never raises."""
    try:
        return str(error)
    except Exception:  # likewise
        return f"<{type(error).__name__} with a failing str>"
