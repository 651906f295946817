"""The registry: names and labels to metrics, and metrics to a snapshot.

A registry knows nothing of other processes. A *connection* may be attached to it from above; while it is,
reads are answered by the connection, for the whole service, and what this process recorded is collected by
it. That is how one class serves one process and fifty, and how metrics made at import time take part. After a
fork `tapes.forks` calls the registries: a child begins from zero, under another identity.

Making is lock-free, as a signal handler may do it: dictionaries decide races (``setdefault``). A metric that
was asked for before is found by one dictionary look-up of its name and labels as they were spelled.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, TypeVar, cast

from tapes import forks, threads
from tapes.catalogue import MAX_SERIES, OVERFLOW, Catalogue
from tapes.clock import Clock, monotonic, tick_at
from tapes.connection import Connection
from tapes.environment import LABELS, labels_given
from tapes.errors import InvalidArgument, KindConflict, TapesError, short_repr
from tapes.face import Faced
from tapes.first_use import FirstUse
from tapes.lineage import unpublished_by_parent
from tapes.metrics import Counter, Gauge, Histogram, Meter, Metric, State, Timer
from tapes.metrics.gauge import MergeMode, Producer, check_gauge
from tapes.naming import Labels, canonical_labels, check_name, label_text
from tapes.producing import run_producers
from tapes.snapshot import Description, Family, Snapshot, Stats

__all__ = ["REJECTED", "Registry", "default_registry"]

M = TypeVar("M", bound=Metric)

REJECTED = "tapes.rejected"
"""The counter of values and messages that were dropped."""
_Words = tuple[str, ...]
_log = logging.getLogger("tapes.registry")


class Registry(Faced):
    """Makes metrics, keeps them, and answers for their values.

    The same name and labels give the same metric, whoever asks. All methods are safe from any thread.

    Args:
        prefix: Put before every name, with a dot.
        labels: Labels of every series of this registry.
        clock: Seconds that never go backwards; for tests.
        max_series: How many label sets a name may have; what comes after them goes to ``overflow="true"``.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> timer = registry.timer("my.timer")
        >>> stats = registry.get_stats()
        >>> print(stats["my"]["timer"]["count"])
        0
    """

    _internal = frozenset({
        "ancestors", "before_fork", "collect", "connect_in_children", "connect_when_read",
        "connect_when_used", "connection", "connection_to_read", "descriptions", "first_use", "forked",
        "gauges", "go_on", "identity", "made", "metrics", "own", "refresh", "reject", "revision",
        "take", "tells_at_request_end",
    })  # fmt: skip

    def __init__(
        self,
        *,
        prefix: str = "",
        labels: Mapping[str, Any] | None = None,
        clock: Clock = monotonic,
        max_series: int = MAX_SERIES,
    ) -> None:
        if not isinstance(max_series, int) or max_series < 1:
            raise InvalidArgument("max_series", got=max_series, expected="a whole number of at least 1")
        self._prefix = check_name(prefix) + "." if prefix else ""
        self._labels = dict(canonical_labels(labels, {}))
        self.clock = clock
        self.max_series = max_series
        self._catalogue = Catalogue()
        self._described: dict[str, Description] = {}
        self._counters: dict[_Words, Counter] = {}
        self._meters: dict[_Words, Meter] = {}
        self._histograms: dict[_Words, Histogram] = {}
        self._timers: dict[_Words, Timer] = {}
        self._gauges: dict[_Words, Gauge] = {}
        self._complained: set[tuple[str, Labels]] = set()
        self._memory: dict[str, Any] = {}
        self.revision = self.made = object()  # others after each change: += 1 of two threads may be one
        self.identity = os.urandom(16)
        self.ancestors: tuple[forks.Ancestor, ...] = ()
        self.connect_when_used: Callable[[], None] | None = None
        self.connect_in_children: Callable[[], None] | None = None
        self.connect_when_read: Callable[[], None] | None = None
        self.tells_at_request_end = False
        self._connection: Connection | None = None
        self.first_use = FirstUse(self)
        forks.add(self)

    @property
    def connection(self) -> Connection | None:
        """What answers for the whole service, if anything does."""
        if self.connect_when_used is not None:
            self.first_use.connect()
        return self._connection

    @connection.setter
    def connection(self, connection: Connection | None) -> None:
        self.connect_when_used = None
        self._connection = connection

    @property
    def connection_to_read(self) -> Connection | None:
        """The same for a reader, which notices a service that this process belongs to and has not joined."""
        if self.connection is None and self.connect_when_read is not None:
            self.connect_when_read()
        return self._connection

    def counter(self, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> Counter:
        """Return the counter of this name and these labels; made if it isn't there.

        A counter counts things: ``.increment()``, ``.decrement()``.

        Raises:
            InvalidName, InvalidLabel: If the name or a label can't be used.
            KindConflict: If the name belongs to another kind of metric.
        """
        if labels is None:  # the same lines in each maker: a call would cost as much as they do
            words = (name, *more_labels, *more_labels.values())
            try:
                return self._counters[words]
            except (KeyError, TypeError):
                pass
        return self._get(Counter, self._counters, name, labels, more_labels)

    def meter(self, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> Meter:
        """Return the meter of this name and these labels; made if it isn't there. Raises as `counter`.

        A meter counts events and knows how often they come: ``.mark()``.
        """
        if labels is None:
            words = (name, *more_labels, *more_labels.values())
            try:
                return self._meters[words]
            except (KeyError, TypeError):
                pass
        return self._get(Meter, self._meters, name, labels, more_labels)

    def histogram(
        self, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any
    ) -> Histogram:
        """Return the histogram of this name and these labels; made if it isn't there. Raises as `counter`.

        A histogram keeps how values are distributed: ``.update(value)``.
        """
        if labels is None:
            words = (name, *more_labels, *more_labels.values())
            try:
                return self._histograms[words]
            except (KeyError, TypeError):
                pass
        return self._get(Histogram, self._histograms, name, labels, more_labels)

    def timer(self, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> Timer:
        """Return the timer of this name and these labels; made if it isn't there. Raises as `counter`.

        A timer keeps durations in seconds: ``with timer.time(): …``, ``@timer.time()``, ``.update(seconds)``.
        """
        if labels is None:
            words = (name, *more_labels, *more_labels.values())
            try:
                return self._timers[words]
            except (KeyError, TypeError):
                pass
        return self._get(Timer, self._timers, name, labels, more_labels)

    def gauge(
        self,
        name: str,
        producer: Producer | None = None,
        *,
        merge: MergeMode = "sum",
        weak: bool = False,
        labels: Mapping[str, Any] | None = None,
        **more_labels: Any,
    ) -> Gauge:
        """Return the gauge of this name and these labels; made if it isn't there.

        A gauge stands at a value: ``.set(value)``, ``.increment()``, ``.decrement()``, or a producer.

        Args:
            name: The name.
            producer: A zero-argument callable that returns the value, run at every read; without one the
                value is what was set. The newest producer replaces an earlier one.
            merge: ``sum``, ``max``, ``min``, ``mean`` or ``each`` (one series per worker) of live workers, to
                which an exited one contributes nothing; or ``last``, the value set last, also if by that.
            weak: Do not keep the producer alive, nor the object that it is a method of.
            labels: The labels.
            **more_labels: Labels too.

        Raises:
            InvalidArgument: If ``producer`` is not callable or ``merge`` is none of the above.
            KindConflict: If the gauge is there with another mode; otherwise as `counter`.
        """
        if labels is None and producer is None and merge == "sum" and weak is False:
            words = (name, *more_labels, *more_labels.values())
            try:
                return self._gauges[words]
            except (KeyError, TypeError):
                pass
        check_gauge(producer, merge, weak)
        gauge = self._get(Gauge, self._gauges, name, labels, more_labels, mode=merge)
        if merge not in (gauge.mode, "sum"):
            raise KindConflict(f"gauge {name!r} merges in another way", got=merge, expected=gauge.mode)
        if producer is not None:
            gauge.produce(producer, weak=weak)
        return gauge

    def describe(
        self, name: str, text: str, *, unit: str | None = None, buckets: Sequence[float] = ()
    ) -> None:
        """Say what a metric means, for those who read its exposition.

        Args:
            name: The metric's name; it need not exist yet.
            text: One sentence.
            unit: The unit of its values, such as ``"bytes"``; timers are always in seconds.
            buckets: Upper bounds for Prometheus, ascending; nothing recorded is lost by changing them.
        """
        self._described[self._prefix + check_name(name)] = Description.checked(text, unit, buckets)
        self.revision = object()

    def remove(self, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> bool:
        """Forget one series, and what it counted; return whether it was there.

        A metric object that somebody still holds goes on recording, but nobody reads it any more.
        """
        full_name = self._prefix + check_name(name)
        metrics = self._catalogue.get(full_name)
        key = self._all_labels(labels, more_labels)
        metric = metrics.by_labels.pop(key, None) if metrics else None
        if metrics is None or metric is None:
            return False
        self._complained.discard((full_name, key))
        if OVERFLOW not in key:
            metrics.free_places.append(0)
        for found in (self._counters, self._meters, self._histograms, self._timers, self._gauges):
            for words in [words for words, kept in found.copy().items() if kept is metric]:
                found.pop(words, None)
        self.revision = object()
        return True

    def get_stats(self) -> Stats:
        """Return the values as a frozen tree of dicts, nested on dots; if connected, of the whole service.

        Raises:
            AggregatorUnavailable: If the registry is connected and the aggregator doesn't answer.
        """
        return self.snapshot().stats()

    async def get_stats_async(self) -> Stats:
        """Return what `get_stats` does, to an event loop that goes on meanwhile (asyncio; trio by anyio)."""
        return await threads.beside_the_loop(self.get_stats)

    def snapshot(self) -> Snapshot:
        """Return one consistent, frozen cut of all series; raises as `get_stats`."""
        connection = self.connection_to_read
        if connection is not None:
            return connection.snapshot()
        self.refresh()
        tick = tick_at(self.clock())
        families = []
        for name, every in self._by_name():
            labels, states = [metric.labels for metric in every], [metric.whole() for metric in every]
            families.append(Family(name, every[0].kind, self._described.get(name), labels, states, tick))
        return Snapshot(families, self._memory)

    def metrics(self) -> Iterator[Metric]:
        """Yield every metric; the counter of bad values last, as those are found when others are folded."""
        for _, every in self._by_name():
            yield from every

    def _by_name(self) -> Iterator[tuple[str, list[Metric]]]:
        for name in [*(name for name, _ in self._catalogue.items() if name != REJECTED), REJECTED]:
            metrics = self._catalogue.get(name)
            if metrics is not None and (every := list(metrics.by_labels.values())):
                yield name, every

    def collect(self) -> Iterator[tuple[str, str, Labels, State]]:
        """Yield kind, name, labels and state of every series of this process, without what it inherited."""
        for metric in self.metrics():
            yield metric.kind, metric.name, metric.labels, metric.collect()

    def refresh(self, max_age_seconds: float = 0.0, *, is_read: bool = True) -> None:
        """Run the producers of gauges whose values are older; see `tapes.producing.run_producers`."""
        run_producers(self.gauges(), max_age_seconds, is_read=is_read)

    def gauges(self) -> list[Gauge]:
        """Return every gauge; looks at no other metric."""
        found = [metrics.by_labels for _, metrics in self._catalogue.items() if metrics.kind is Gauge]
        return cast("list[Gauge]", [gauge for gauges in found for gauge in list(gauges.values())])

    def take(self) -> Iterator[tuple[str, str, Labels, State]]:
        """Yield what `collect` does and start again from zero, under another identity; see `Metric.take`."""
        for metric in self.metrics():
            yield metric.kind, metric.name, metric.labels, metric.take()
        self.ancestors = ()  # last: a child that is forked meanwhile speaks of who says goodbye
        self.identity = os.urandom(16)

    def before_fork(self) -> None:
        """Called before this process forks; see `tapes.forks`."""
        self.first_use.before_fork()
        if self._connection is not None:
            self._connection.before_fork()

    def go_on(self) -> None:
        """Called in the parent after a fork."""
        if self._connection is not None:
            self._connection.go_on()
        self.first_use.after_in_parent()

    def forked(self, parent: forks.Process, version: int) -> None:
        """Called in a forked child: begin from zero, and keep what the parent had not published."""
        connection = self._connection
        self.ancestors += unpublished_by_parent(self, connection, parent, version)
        self.identity = os.urandom(16)
        self.connect_when_used = self.connect_in_children or self.connect_when_used
        if connection is not None:
            connection.begin_anew()
        self.first_use.after_in_child(is_to_connect=bool(connection or self.connect_in_children))

    def descriptions(self) -> dict[str, Description]:
        """Return what was said of each name."""
        return dict(self._described)

    def reject(self, name: str, labels: Labels, value: Any, why: str) -> None:
        """Count something that can't be recorded in `REJECTED`, and log it once per series."""
        with contextlib.suppress(KindConflict):
            self.own(Counter, REJECTED).increment()
        if (name, labels) not in self._complained:
            self._complained.add((name, labels))
            with contextlib.suppress(Exception):  # whatever logging is made to do, it is not the request's
                _log.warning(
                    "tapes dropped %s for %r: %s (further ones are counted in %s)",
                    short_repr(value), name, why, REJECTED,
                )  # fmt: skip

    def own(self, kind: type[M], name: str, **labels: str) -> M:
        """Return a metric about tapes itself: it has none of the prefix and the labels of this registry."""
        return self._make(kind, name, canonical_labels(labels, {}), {"mode": "sum"} if kind is Gauge else {})

    def _get(
        self,
        kind: type[M],
        found: dict[_Words, M],
        name: str,
        labels: Mapping[str, Any] | None,
        more_labels: dict[str, Any],
        **options: Any,
    ) -> M:
        """Return a metric; remembered in ``found`` under its name and its labels, as words in given order."""
        words = None
        if labels is None and type(name) is str:
            words = (name, *more_labels, *map(label_text, more_labels.values()))
            if words in found:
                return found[words]
        all_labels = self._all_labels(labels, more_labels)
        metric = self._make(kind, self._prefix + check_name(name), all_labels, options)
        if words is not None and metric.labels == all_labels:
            found[words] = metric
            metrics = self._catalogue.get(metric.name)
            if metrics is None or metrics.by_labels.get(all_labels) is not metric:  # removed meanwhile
                found.pop(words, None)
        return metric

    def _all_labels(self, labels: Mapping[str, Any] | None, more: Mapping[str, Any]) -> Labels:
        given = canonical_labels(labels, more)
        return tuple(sorted({**self._labels, **dict(given)}.items())) if self._labels else given

    def _make(self, kind: type[M], name: str, labels: Labels, options: dict[str, Any]) -> M:
        if self.connect_when_used is not None and self.first_use.wake is None:
            self.first_use.connect()

        def build(labels: Labels) -> M:
            made.append(kind(name, labels, self.clock, self, **options))
            if self.first_use.wake is not None:
                made[0].sleep(self.first_use.woken)
            return made[0]

        made: list[M] = []
        overflow = self._all_labels(dict([OVERFLOW]), {})
        found = self._catalogue.find_or_make(name, labels, kind, build, self.max_series, overflow)
        if made:
            self.made = object()  # after it can be found
        return cast("M", found)

    def rejected(self, metric: Metric, value: Any, why: str) -> None:
        """Count and log a value that ``metric`` can't record."""
        self.reject(metric.name, metric.labels, value, why)

    def recipe(self, metric: Metric | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what gives ``metric``, or this registry, in the process that unpickles it."""
        if self is not default_registry:
            raise InvalidArgument(
                "a metric can't be pickled" if metric else "a registry can't be pickled",
                got=metric or self,
                expected="one of the default registry",
                remedy="make it again in the other process, or leave it out with __getstate__",
            )
        options = {"mode": metric.mode} if isinstance(metric, Gauge) else {}
        return _of_default_registry, (metric and (type(metric), metric.name, metric.labels, options),)

    def __copy__(self) -> Registry:
        return self

    def __deepcopy__(self, memo: Any) -> Registry:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.recipe()


def _of_default_registry(
    metric: tuple[type[Metric], str, Labels, dict[str, Any]] | None,
) -> Metric | Registry:
    return default_registry._make(*metric) if metric else default_registry


def _default_registry() -> Registry:
    try:
        return Registry(labels=labels_given())
    except TapesError as error:  # it is the import of the user's application that comes here
        _log.warning("tapes records without the labels of %s: %s", LABELS, error)
        return Registry()


default_registry = _default_registry()
"""The registry behind ``tapes.counter()`` and its siblings."""
