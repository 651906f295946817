"""Helpers for tests of code that records.

`strict` raises an exception where production drops and counts a bad value. `assert_recorded` compares what
was recorded, and shows all of it if that differs. `ManualClock` moves only when you advance it. With pytest
there are fixtures, in every project that has tapes installed:

    def test_a_job_is_counted(tapes_registry):
        run_job()
        assert_recorded("jobs.done", value=1)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tapes.errors import BadValue, InvalidArgument
from tapes.metrics import Counter, Gauge, Histogram, Meter, Metric, Timer
from tapes.metrics.sifting import EXPECTED
from tapes.naming import Labels, canonical_labels, selector
from tapes.producing import run_producers
from tapes.registry import Registry, default_registry
from tapes.session import LocalSession
from tapes.snapshot import Snapshot

__all__ = ["ManualClock", "assert_recorded", "strict"]

__tracebackhide__ = True
"""pytest shows the line of the test that fails, and no frame of this module."""


class ManualClock:
    """A clock for tests; it moves only when you advance it.

    Args:
        start_seconds: The time at which it starts.

    Example:
        >>> import tapes
        >>> from tapes.testing import ManualClock
        >>> clock = ManualClock()
        >>> registry = tapes.Registry(clock=clock)
        >>> with registry.timer("page.render").time():
        ...     clock.advance(0.25)
        >>> registry.get_stats().page.render.q50
        0.25
    """

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._now_seconds = float(start_seconds)

    def __call__(self) -> float:
        """Return its time, in seconds."""
        return self._now_seconds

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds``, zero or more."""
        if seconds < 0:
            raise InvalidArgument("advance(seconds)", got=seconds, expected="zero or more")
        self._now_seconds += seconds


@contextmanager
def strict(registry: Registry = default_registry) -> Iterator[Registry]:
    """Raise bad values where they are recorded; begin and end with nothing recorded.

    In the block, a value that production drops and counts raises `BadValue` from the call that records it. A
    failing producer of a gauge raises it from the read. What was recorded before is forgotten at the
    beginning, and what is recorded in the block at its end; gauges keep their values. Metrics made before the
    block take part. For tests only: recording is slow, and the registry must not be connected.

    Args:
        registry: By default the one behind ``tapes.counter()`` and its siblings.

    Raises:
        InvalidArgument: If the registry is connected.

    Example:
        >>> import tapes
        >>> from tapes.testing import strict
        >>> with strict(tapes.Registry()) as registry:
        ...     registry.histogram("mail.size").update("12 kB")
        Traceback (most recent call last):
        ...
        tapes.errors.BadValue: 'mail.size' can't record it: got '12 kB', expected a finite number
    """
    if registry.session.resolved().is_connected:
        raise InvalidArgument(
            "strict()", got="a connected registry", expected="a local one", remedy="close() it first"
        )
    _hide_frames_below()
    ordinary = type(registry)
    if not isinstance(registry, _Strict):  # a block within a block
        registry.__class__ = type(f"Strict{ordinary.__name__}", (_Strict, ordinary), {})
    try:
        _forget(registry, _CheckedBuffer)
        yield registry
    finally:
        registry.__class__ = ordinary
        _forget(registry, _CheckedBuffer if issubclass(ordinary, _Strict) else lambda metric: [])


def _hide_frames_below() -> None:
    """Make pytest show the line that records a bad value, and no frame of tapes below it."""
    kinds = (Registry, Counter, Gauge, Histogram, Meter, Timer)
    names = {every.__module__ for kind in kinds for every in kind.__mro__ if every is not object}
    for name in names | {run_producers.__module__, LocalSession.__module__}:
        vars(sys.modules[name])["__tracebackhide__"] = _is_bad_value


def _is_bad_value(raised: Any) -> bool:
    """Return whether pytest's ``ExceptionInfo`` is of a bad value; other errors show all frames."""
    return isinstance(raised.value, BadValue)


def _forget(registry: Registry, make_buffer: Callable[[Metric], list[Any]]) -> None:
    """Start every metric again from zero, with a new buffer."""
    for metric in registry.metrics():
        metric._pending.clear()
        metric.drain()
        metric._buffer = metric._pending = make_buffer(metric)


class _Strict(Registry):
    def _make(self, *args: Any) -> Any:
        metric = super()._make(*args)
        if type(metric._pending) is list:
            metric._buffer = metric._pending = _CheckedBuffer(metric)
        return metric

    def reject(self, name: str, labels: Labels, value: Any, why: str) -> None:
        reason, _, remedy = why.partition("; ")
        expected = EXPECTED.get(reason, "")
        what = "can't record it" if expected else f"can't be read: {why}"
        error = BadValue(
            f"{name + selector(labels)!r} {what}",
            got=value,
            expected=expected,
            remedy=remedy if expected else "",
        )
        if expected:
            raise error from None
        raise error  # what a producer raised is shown before it


class _CheckedBuffer(list[Any]):
    """A buffer that is folded with every value, so that the call that records a bad one raises."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def append(self, value: Any) -> None:
        super().append(value)
        self._metric._fold(self._metric._clock(), wait=True)


def assert_recorded(
    name: str,
    labels: Mapping[str, Any] | None = None,
    *,
    registry: Registry = default_registry,
    **fields: Any,
) -> None:
    """Assert that a series was recorded and that its fields are as given.

    Args:
        name: The metric's name.
        labels: Exactly the labels of the series; none by default.
        registry: By default the one behind ``tapes.counter()`` and its siblings.
        **fields: Fields of ``get_stats()``: ``value=3``, ``count=2``, ``q50=pytest.approx(0.25)``. Each is
            compared by ``==``. Without any, not all fields may be 0.

    Raises:
        AssertionError: If not; it shows what differs and everything that was recorded.

    Example:
        >>> import tapes
        >>> from tapes.testing import assert_recorded
        >>> registry = tapes.Registry()
        >>> registry.counter("jobs.done", queue="mail").increment()
        >>> assert_recorded("jobs.done", {"queue": "mail"}, value=2, registry=registry)
        Traceback (most recent call last):
        ...
        AssertionError: jobs.done{queue="mail"}: value is 1, expected 2
        recorded:
          jobs.done{queue="mail"}: value=1
    """
    snapshot = registry.snapshot()
    wanted = name + selector(canonical_labels(labels, {}))
    series = snapshot.get(name, labels=labels)
    recorded = {} if series is None else series.fields()
    differences = [
        f"{field} is {recorded[field]!r}, expected {value!r}"
        if field in recorded
        else f"there is no {field}, expected {value!r}"
        for field, value in fields.items()
        if field not in recorded or recorded[field] != value
    ]
    if differences or not any(recorded if fields else recorded.values()):
        what = f": {', '.join(differences)}" if recorded and fields else " was not recorded"
        raise AssertionError(f"{wanted}{what}\nrecorded:\n{_shown(snapshot)}")


def _shown(snapshot: Snapshot) -> str:
    lines = []
    for family in snapshot:
        for series in family.series:
            shown = ", ".join(f"{field}={value!r}" for field, value in series.fields().items())
            lines.append(f"  {family.name}{selector(series.labels)}: {shown}")
    return "\n".join(lines or ["  nothing"])
