"""Errors for uses of a metric that are right in other libraries.

Names that a metric does not have, but that metrics of other libraries have, are descriptors that raise an
`AttributeError` with the right method. ``hasattr()`` is false for them, type checkers do not see them, and
``dir()`` does not list them. A ``__getattr__`` would slow down every method call on CPython 3.11. For
mistyped names, Python itself suggests the right one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tapes.errors import InvalidCall, UnknownAttribute
from tapes.face import Faced

_PUBLIC = {
    "counter": ".increment(n) or .decrement(n)",
    "gauge": ".set(value), .increment(n) or .decrement(n)",
    "histogram": ".update(value)",
    "meter": ".mark(n)",
    "timer": "with .time(), @….time() or .update(seconds)",
}

_READ = "read values by tapes.get_stats() or registry.snapshot()"
_DURATION = "durations are a timer's: with tapes.timer(name).time()"
_VALUE = "a value that is set is a gauge's: tapes.gauge(name).set(value)"
_DISTRIBUTION = "a distribution is a histogram's: tapes.histogram(name).update(value)"
_COUNT = "counts are a counter's: tapes.counter(name).increment(n)"

_UP, _DOWN = ("inc", "incr", "add"), ("dec", "decr", "sub", "subtract")
_PLAIN = {"value": _READ, "get": _READ, "count": _READ}
_ADVICE: dict[str, dict[str, str]] = {
    "counter": {
        **dict.fromkeys(_UP, "use .increment(n)"), **dict.fromkeys(_DOWN, "use .decrement(n)"),
        **dict.fromkeys(("observe", "record", "update"), _DISTRIBUTION), **_PLAIN,
        "mark": "use .increment(n), or tapes.meter(name).mark(n) for rates", "set": _VALUE, "time": _DURATION,
    },
    "gauge": {
        **dict.fromkeys(_UP, "use .increment(n)"), **dict.fromkeys(_DOWN, "use .decrement(n)"),
        **dict.fromkeys(("observe", "record", "update"), "use .set(value)"), **_PLAIN,
        "set_function": "give the function to the maker: tapes.gauge(name, function)",
        "set_to_current_time": "use .set(time.time())", "time": _DURATION,
    },
    "histogram": {
        **dict.fromkeys(("observe", "record", "add"), "use .update(value)"), **_PLAIN,
        **dict.fromkeys(("inc", "increment"), _COUNT), "mark": "use .update(value)", "set": _VALUE,
        "time": _DURATION,
    },
    "meter": {
        **dict.fromkeys((*_UP, "increment", "record", "update"), "use .mark(n)"), **_PLAIN,
        **dict.fromkeys((*_DOWN, "decrement"), "a meter counts events only; use a counter or a gauge"),
        "observe": _DISTRIBUTION, "set": _VALUE, "time": _DURATION,
    },
    "timer": {
        **dict.fromkeys(("observe", "record", "add"), "use .update(seconds)"), **_PLAIN,
        **dict.fromkeys(("inc", "increment", "mark"), "a timer counts what it times; use .time()"),
        "set": _VALUE, **dict.fromkeys(("start", "stop", "measure"), "use with timer.time()"),
    },
}  # fmt: skip


class _Unknown:
    """A name of other libraries; raises when it is looked up."""

    def __init__(self, kind: str, name: str, remedy: str) -> None:
        self._kind, self._name, self._remedy = kind, name, remedy

    def __get__(self, metric: Any, owner: type) -> Any:
        what, expected = f"a {self._kind} has no attribute {self._name!r}", _PUBLIC[self._kind]
        raise UnknownAttribute(what, attribute=self._name, expected=expected, remedy=self._remedy)


class Guided(Faced):
    """The base of metrics; the error of a wrong use names the right one."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kind = cls.__dict__.get("kind")
        for name, remedy in _ADVICE.get(kind or "", {}).items():
            setattr(cls, name, _Unknown(str(kind), name, remedy))
        cls._internal = cls._internal.union(_ADVICE.get(kind or "", ()))

    if not TYPE_CHECKING:  # type checkers know what __init__ takes

        def __new__(cls, *args: Any, **options: Any) -> Any:
            if len(args) < 4:
                maker = f"tapes.{cls.kind}" if hasattr(cls, "kind") else "a maker of tapes"
                raise InvalidCall(
                    f"{cls.__name__}() is not called by applications",
                    got=args[0] if args else None,
                    expected=f"a call of {maker}(name)",
                    remedy=f"use {cls.__name__} in annotations, and tapes.describe() for a help text",
                )
            return super().__new__(cls)


class LabelsOf(tuple[tuple[str, str], ...]):
    """The labels of a metric; equal to the plain tuple of names and values."""

    __slots__ = ()

    def __call__(self, *args: Any, **labels: Any) -> Any:
        """Raise `InvalidCall`: a metric has its labels from its maker."""
        raise InvalidCall(
            "a metric has the labels that it was made with",
            got=labels or args,
            expected="labels in the call of the maker",
            remedy="ask the maker each time: tapes.counter('jobs.done', queue='mail')",
        )

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)
