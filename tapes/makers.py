"""The makers of a registry: from a name and labels, as a call spells them, to a metric.

Theory. A metric that was asked for before is found by one look-up of its kind, its name, and its labels in
the order of the call. Everything else is the slow path: to check, to make, and to explain a wrong call.
Each maker is written as its slow path, and `_maker` puts the look-up before it. The function that is called
accepts any arguments, so that the slow path can explain what is wrong; Python's own error would only count
the arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from tapes.errors import InvalidCall, InvalidName, KindConflict, short_repr
from tapes.face import Faced
from tapes.metrics import Counter, Gauge, Histogram, Meter, Metric, Timer
from tapes.metrics.gauge import MergeMode, Producer, check_gauge
from tapes.naming import Labels, canonical_labels, check_name, label_text

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=Metric)

_OWN = "tapes."  # how the names of metrics about tapes itself begin
_NO_NAME: Any = object()
_Key = tuple[Any, ...]


def _maker(kind: type[Metric]) -> Callable[[F], F]:
    def decorate(slow: F) -> F:
        def maker(
            self: Makers, name: Any = _NO_NAME, /, *misplaced: Any, labels: Any = None, **more_labels: Any
        ) -> Any:
            if labels is None and not misplaced:
                key = (kind, name, *more_labels, *more_labels.values()) if more_labels else (kind, name)
                try:
                    return self._found[key]
                except (KeyError, TypeError):
                    pass
            name = _checked_call(kind, name, misplaced, more_labels)
            return slow(self, name, labels=labels, **more_labels)

        return cast("F", functools.wraps(slow)(maker))

    return decorate


def _gauge_maker(slow: F) -> F:
    def maker(
        self: Makers, name: Any = _NO_NAME, /, producer: Any = None, *misplaced: Any,
        merge: Any = "sum", weak: Any = False, labels: Any = None, **more_labels: Any,
    ) -> Any:  # fmt: skip
        if labels is None and producer is None and merge == "sum" and weak is False and not misplaced:
            key = (Gauge, name, *more_labels, *more_labels.values()) if more_labels else (Gauge, name)
            try:
                return self._found[key]
            except (KeyError, TypeError):
                pass
        name = _checked_call(Gauge, name, misplaced, more_labels)
        return slow(self, name, producer, merge=merge, weak=weak, labels=labels, **more_labels)

    return cast("F", functools.wraps(slow)(maker))


class Makers(Faced):
    """What makes metrics; a base of `tapes.Registry`."""

    _prefix: str

    def __init__(self) -> None:
        self._found: dict[_Key, Metric] = {}

    @_maker(Counter)
    def counter(
        self, /, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any
    ) -> Counter:
        """Return the counter with this name and these labels; make it if it does not exist.

        A counter counts things that happen: requests, errors, bytes sent. Record with ``.increment()``. Use a
        gauge for a level that rises and falls, such as open connections.

        Raises:
            InvalidName, InvalidLabel: If the name or a label can't be used.
            KindConflict: If the name belongs to another kind of metric.
        """
        return self._get(Counter, name, labels, more_labels)

    @_maker(Meter)
    def meter(self, /, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> Meter:
        """Return the meter with this name and these labels; make it if it does not exist.

        A meter counts events and keeps their rates over the last 1, 5 and 15 minutes: logins, cache misses,
        messages. Record with ``.mark()``. Use a counter if your monitoring system computes rates itself.
        Raises as `counter`.
        """
        return self._get(Meter, name, labels, more_labels)

    @_maker(Histogram)
    def histogram(
        self, /, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any
    ) -> Histogram:
        """Return the histogram with this name and these labels; make it if it does not exist.

        A histogram shows how values are distributed: response sizes, rows per query, batch lengths. Record
        with ``.update(value)``. Use a timer for durations. Raises as `counter`.
        """
        return self._get(Histogram, name, labels, more_labels)

    @_maker(Timer)
    def timer(self, /, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> Timer:
        """Return the timer with this name and these labels; make it if it does not exist.

        A timer shows how long things take, in seconds, and how often they happen: requests, queries, jobs.
        Record with ``with timer.time(): …``, ``@timer.time()`` or ``.update(seconds)``. Raises as `counter`.
        """
        return self._get(Timer, name, labels, more_labels)

    @_gauge_maker
    def gauge(
        self, /, name: str, producer: Producer | None = None, *, merge: MergeMode = "sum", weak: bool = False,
        labels: Mapping[str, Any] | None = None, **more_labels: Any,
    ) -> Gauge:  # fmt: skip
        """Return the gauge with this name and these labels; make it if it does not exist.

        A gauge shows a level that rises and falls: queue length, open connections, memory in use. Record with
        ``.set(value)``, ``.increment()`` or ``.decrement()``, or by a producer. Use a counter for events.

        Args:
            name: The name.
            producer: A zero-argument callable that returns the value, run at every read; without one the
                value is what was set. The newest producer replaces an earlier one.
            merge: ``sum``, ``max``, ``min``, ``mean`` or ``each`` (one series per worker) of live workers, to
                which an exited one contributes nothing; or ``last``: the value set last, even if its worker
                has exited.
            weak: Do not keep the producer alive, nor the object that it is a method of.
            labels: The labels.
            **more_labels: Labels too.

        Raises:
            InvalidArgument: If ``producer`` is not callable or ``merge`` is not one of these modes.
            KindConflict: If the gauge is there with another mode; otherwise as `counter`.
        """
        check_gauge(producer, merge, weak)
        gauge = self._get(Gauge, name, labels, more_labels, mode=merge)
        if merge not in (gauge.mode, "sum"):
            raise KindConflict(f"gauge {name!r} merges in another way", got=merge, expected=gauge.mode)
        if producer is not None:
            gauge.produce(producer, weak=weak)
        return gauge

    def _get(
        self, kind: type[M], name: str, labels: Mapping[str, Any] | None, more: dict[str, Any], **options: Any
    ) -> M:
        """Return a metric; remembered under its kind, name and labels in the order of the call."""
        key = None
        if labels is None and type(name) is str:
            key = (kind, name, *more, *map(label_text, more.values()))
            if key in self._found:
                return cast("M", self._found[key])
        all_labels = self._all_labels(labels, more)
        metric = self._make(kind, self._full_name(name), all_labels, options)
        if key is not None and metric.labels == all_labels:
            self._found[key] = metric
            if not self._is_there(metric, all_labels):  # removed meanwhile
                self._found.pop(key, None)
        return metric

    def _forget(self, metric: Metric) -> None:
        for key in [key for key, kept in self._found.copy().items() if kept is metric]:
            self._found.pop(key, None)

    def _full_name(self, name: str) -> str:
        full_name = check_name(self._prefix + check_name(name)) if self._prefix else check_name(name)
        if full_name.startswith(_OWN):
            raise _taken(full_name)
        return full_name

    def _all_labels(self, labels: Mapping[str, Any] | None, more: Mapping[str, Any]) -> Labels:
        raise NotImplementedError

    def _make(self, kind: type[M], name: str, labels: Labels, options: dict[str, Any]) -> M:
        raise NotImplementedError

    def _is_there(self, metric: Metric, labels: Labels) -> bool:
        raise NotImplementedError


def check_prefix(prefix: str) -> str:
    """Return what comes before the names of a registry with ``prefix``; raises InvalidName."""
    before = check_name(prefix) + "." if prefix else ""
    if before.startswith(_OWN):
        raise _taken(prefix)
    return before


def _taken(name: str) -> InvalidName:
    return InvalidName(
        f"names that begin with {_OWN!r} are those of metrics about tapes itself",
        got=name, expected="another name", remedy="put the name of your application before it",
    )  # fmt: skip


def _checked_call(kind: type[Metric], name: Any, misplaced: tuple[Any, ...], more: dict[str, Any]) -> Any:
    """Return the name of a call, maybe from ``more``, its keywords; raises InvalidCall or InvalidLabel."""
    if name is not _NO_NAME:
        canonical_labels({}, {"name": more["name"]} if "name" in more else {})
    elif "name" in more:
        name = more.pop("name")
    else:
        expected = f"a name, and labels as keywords: {kind.kind}('jobs.done', queue='mail')"
        raise InvalidCall(f"{kind.kind}() has no name", expected=expected)
    if misplaced:
        raise _misplaced(kind, name, misplaced[0])
    return name


def _misplaced(kind: type[Metric], name: Any, given: Any) -> InvalidCall:
    """Return the error of a positional argument behind the name."""
    maker, name = kind.kind, short_repr(name)
    if isinstance(given, Mapping):
        remedy = f"pass a dict of labels by its keyword: {maker}({name}, labels={short_repr(given)})"
    elif isinstance(given, (list, tuple)):
        remedy = f"label names are not declared; give each call their values: {maker}({name}, method='GET')"
    else:
        remedy = f"for a help text call tapes.describe({name}, {short_repr(given)}); a label has a name"
    expected = f"a name, and labels as keywords: {maker}({name}, method='GET')"
    what = f"{maker}() takes no positional argument there"
    return InvalidCall(what, got=given, expected=expected, remedy=remedy)
