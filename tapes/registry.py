"""The registry: names and labels to metrics, and metrics to a snapshot.

A registry knows nothing of other processes: it has a *session* (`tapes.session`), which answers reads, for
this process or for the whole service. So one class serves one process and fifty, and metrics that are made
at import time take part.

Making is lock-free, as a signal handler may do it: dictionaries decide races (``setdefault``). A metric that
was asked for before is found by one dictionary look-up of its name and labels as they were spelled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from tapes import forks, threads
from tapes.catalogue import MAX_SERIES, OVERFLOW, Catalogue
from tapes.clock import Clock, monotonic, tick_at
from tapes.environment import LABELS, configured_labels
from tapes.errors import InvalidArgument, TapesError
from tapes.lineage import Lineage
from tapes.makers import Makers, check_prefix
from tapes.metrics import Gauge, Metric, State
from tapes.naming import Labels, canonical_labels, check_name, is_cut
from tapes.processes import Process
from tapes.producing import run_producers
from tapes.rejections import REJECTED, Rejections
from tapes.session import LocalSession, Session
from tapes.snapshot import Description, Family, Snapshot, Stats

__all__ = ["REJECTED", "Registry", "default_registry"]

M = TypeVar("M", bound=Metric)

_log = logging.getLogger("tapes.registry")


class Registry(Makers):
    """Makes metrics, keeps them, and answers for their values.

    The same name and labels give the same metric. All methods are safe from any thread.

    Args:
        prefix: Put before every name, with a dot.
        labels: Labels of every series of this registry.
        clock: Seconds that never go backwards; for tests.
        max_series: Maximum number of label sets of a name; further ones share ``overflow="true"``.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> timer = registry.timer("my.timer")
        >>> stats = registry.get_stats()
        >>> print(stats["my"]["timer"]["count"])
        0
    """

    _internal = frozenset({
        "after_in_child", "after_in_parent", "before_fork", "collect", "descriptions", "gauges", "lineage",
        "local_snapshot", "made_token", "metrics", "own", "recipe", "refresh", "reject", "rejected",
        "session", "structure_token", "use",
    })  # fmt: skip

    def __init__(
        self, *, prefix: str = "", labels: Mapping[str, Any] | None = None,
        clock: Clock = monotonic, max_series: int = MAX_SERIES,
    ) -> None:  # fmt: skip
        if not isinstance(max_series, int) or max_series < 1:
            raise InvalidArgument("max_series", got=max_series, expected="a whole number of at least 1")
        super().__init__()
        self._prefix = check_prefix(prefix)
        self._labels = dict(canonical_labels(labels, {}))
        self.clock = clock
        self.max_series = max_series
        self._catalogue = Catalogue()
        self._described: dict[str, Description] = {}
        self._memory: dict[str, Any] = {}
        # Tokens, compared by identity: `+= 1` of two threads may be one change.
        self.structure_token = self.made_token = object()
        self._rejections = Rejections(self)
        self.lineage = Lineage(self)
        self.session: Session = LocalSession(self)
        forks.register(self)

    def use(self, session: Session) -> None:
        """Go on with ``session``; if that sleeps, all metrics do."""
        session.flush_per_request |= self.session.flush_per_request
        self.session = session
        if session.sleeps:
            for metric in self.metrics():
                metric.sleep(self._woken)

    def _woken(self) -> bool:
        return self.session.woken()

    def describe(
        self, name: str, text: str, *, unit: str | None = None, buckets: Sequence[float] = ()
    ) -> None:
        """Set the help text of a metric, and how it is exposed.

        Args:
            name: The metric's name; the metric need not exist yet.
            text: One sentence.
            unit: The unit of its values, such as ``"bytes"``; timers are always in seconds.
            buckets: Upper bounds for Prometheus, ascending; nothing recorded is lost by changing them.
        """
        self._described[self._prefix + check_name(name)] = Description.checked(text, unit, buckets)
        self.structure_token = object()

    def remove(self, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> bool:
        """Remove one series with its count; return whether it existed.

        A metric object that your code still holds can record, but no reader sees its values.
        """
        full_name = self._prefix + check_name(name)
        metrics = self._catalogue.get(full_name)
        key = self._all_labels(labels, more_labels)
        metric = metrics.by_labels.pop(key, None) if metrics else None
        if metrics is None or metric is None:
            return False
        self._rejections.forget(full_name, key)
        self._forget(metric)
        self.structure_token = object()
        return True

    def get_stats(self) -> Stats:
        """Return the values as a frozen tree of dicts, nested on dots; if connected, of the whole service.

        Raises:
            AggregatorUnavailable: If the registry is connected and the aggregator doesn't answer.
        """
        return self.snapshot().stats()

    async def get_stats_async(self) -> Stats:
        """Return what `get_stats` does, without blocking the event loop (asyncio; trio by anyio)."""
        return await threads.run_in_thread(self.get_stats)

    def snapshot(self) -> Snapshot:
        """Return one consistent, frozen cut of all series; raises as `get_stats`."""
        return self.session.resolved_for_read().snapshot()

    def local_snapshot(self) -> Snapshot:
        """Return the same of this process alone."""
        self.refresh()
        tick = tick_at(self.clock())
        families = []
        for name, every in self._by_name():
            labels, states = [metric.labels for metric in every], [metric.total_state() for metric in every]
            families.append(Family(name, every[0].kind, self._described.get(name), labels, states, tick))
        return Snapshot(families, self._memory)

    def metrics(self) -> Iterator[Metric]:
        """Yield every metric; the counter of bad values comes last, as folding the others finds them."""
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

    def before_fork(self) -> None:
        """Called before this process forks; see `tapes.forks`."""
        self.session.before_fork()

    def after_in_parent(self) -> None:
        """Called in the parent after a fork."""
        self.session.after_in_parent()

    def after_in_child(self, parent: Process, version: int) -> None:
        """Called in a forked child: begin from zero, and keep what the parent had not published."""
        self.lineage.begin_in_child(self.session, parent, version)
        self.session.after_in_child()

    def descriptions(self) -> dict[str, Description]:
        """Return the description of each name."""
        return dict(self._described)

    def reject(self, name: str, labels: Labels, value: Any, why: str) -> None:
        """Count a value or message that was dropped, and log it once for each series."""
        self._rejections.reject(name, labels, value, why)

    def own(self, kind: type[M], name: str, **labels: str) -> M:
        """Return a metric about tapes itself, without the prefix and the labels of this registry."""
        return self._make(kind, name, canonical_labels(labels, {}), {"mode": "sum"} if kind is Gauge else {})

    def _all_labels(self, labels: Mapping[str, Any] | None, more: Mapping[str, Any]) -> Labels:
        given = canonical_labels(labels, more)
        return tuple(sorted({**self._labels, **dict(given)}.items())) if self._labels else given

    def _is_there(self, metric: Metric, labels: Labels) -> bool:
        metrics = self._catalogue.get(metric.name)
        return metrics is not None and metrics.by_labels.get(labels) is metric

    def _make(self, kind: type[M], name: str, labels: Labels, options: dict[str, Any]) -> M:
        if self.session.is_pending and not self.session.sleeps:
            self.session.resolved()

        def build(labels: Labels) -> M:
            made.append(kind(name, labels, self.clock, self, **options))
            if self.session.sleeps:
                made[0].sleep(self._woken)
            return made[0]

        made: list[M] = []
        overflow = self._all_labels(dict([OVERFLOW]), {})
        found = self._catalogue.find_or_make(name, labels, kind, build, self.max_series, overflow)
        if made:
            self.made_token = object()  # after it can be found
            if any(is_cut(value) for _, value in made[0].labels):
                self._rejections.note_cut(name)
        return cast("M", found)

    def rejected(self, metric: Metric, value: Any, why: str) -> None:
        """Count and log a value that ``metric`` can't record."""
        self.reject(metric.name, metric.labels, value, why)

    def recipe(self, metric: Metric | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what makes ``metric``, or this registry, in the process that unpickles it."""
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


def _of_default_registry(metric: tuple[Any, ...] | None) -> Metric | Registry:
    return default_registry._make(*metric) if metric else default_registry


def _default_registry() -> Registry:
    try:
        return Registry(labels=configured_labels())
    except TapesError as error:  # the import of the user's application must not fail
        _log.warning("tapes records without the labels of %s: %s", LABELS, error)
        return Registry()


default_registry = _default_registry()
"""The registry behind ``tapes.counter()`` and its siblings."""
