"""The outbox of a worker: its series, which of them changed since the last publication, and its goodbyes."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from typing import Any

from tapes import forks, processes, threads
from tapes.distributed.protocol.messages import HEARTBEAT_SECONDS, Goodbye, Item, Reply, Update
from tapes.distributed.storage import spool
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AggregatorUnavailable
from tapes.metrics import Metric, State, Timer
from tapes.metrics.origin import with_baseline
from tapes.naming import Labels
from tapes.processes import lives
from tapes.registry import Registry
from tapes.rejections import REJECTED

DURATION = "tapes.publish.duration"  # the timer of publications; published only together with other changes
_DURATION_SECONDS = 1.0  # minimum time between two publications of it


_pending: weakref.WeakKeyDictionary[Registry, list[Update]] = weakref.WeakKeyDictionary()


class _Series:
    __slots__ = ("key", "metric", "published")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.key = (metric.name, metric.labels)
        self.published: State | None = None


class Outbox:
    """Makes the updates of a worker.

    States are immutable and an untouched series keeps its state object, so a series has changed if its state
    is another object than the published one. Pending values are folded before the lock is taken, as folding
    may log; under the lock nothing waits, except in `drain`.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.host = processes.host_id()
        self.published_seq = 0
        self._identity = registry.lineage.identity
        self._process = forks.this_process()
        self._lock = threads.RLock()
        self._seq = 0
        self._revision: object = None
        self._made: tuple[object, object] = (None, None)
        self._series: dict[tuple[str, Labels], _Series] = {}
        self._duration_published = self._sent = 0.0

    def published(self, series: tuple[str, Labels]) -> State | None:
        found = self._series.get(series)
        return None if found is None else found.published

    def update(self, *, keyframe: bool = False) -> Update:
        """Return what changed since the last publication, or everything.

        Sequence numbers are drawn under the lock that states are read under, so that the higher number
        always has the newer state.
        """
        changed = self._fold(keyframe)
        with self._lock:
            return self._update(changed, keyframe)

    def publish(self, send: Callable[[Update], bool], *, keyframe: bool = False) -> bool:
        """Pass ``send`` what changed, if anything; it counts as published if that returns ``True``.

        From time to time it passes an empty update, as a heartbeat.
        """
        started = time.monotonic()
        whole = keyframe or self.registry.structure_token is not self._revision
        changed = self._fold(whole)
        is_due = whole or started - self._sent > HEARTBEAT_SECONDS
        if not is_due and all(series.key[0] == DURATION for series in changed):
            return True
        with self._lock:
            revision = self.registry.structure_token
            update = self._update(changed, whole or revision is not self._revision)
            if not send(update):
                return False
            for item in update.items:
                self._series[item.name, item.labels].published = item.state
                if item.name == DURATION:
                    self._duration_published = started
            self._sent = started
            self.published_seq = update.seq
            self._revision = revision
        self.registry.own(Timer, DURATION).update(time.monotonic() - started)
        return True

    def reset_baselines(self) -> None:
        """Make everything published baseline, as the aggregator that subscribes may be another one."""
        with self._lock:
            for series in self._series.values():
                if series.published is not None:
                    series.metric.note_baseline(series.published)
            for ancestor in self.registry.lineage.ancestors if self.published_seq else ():
                _make_baseline(ancestor)

    def begin(self, *, is_another_aggregator: bool) -> None:
        """Make the records of ancestors baseline that an aggregator may have had; before the first update.

        An ancestor that was connected may have published its record to an earlier aggregator. If it is alive,
        its own updates decide.
        """
        for ancestor in self.registry.lineage.ancestors:
            if ancestor.is_connected and (is_another_aggregator or lives(ancestor.process)):
                _make_baseline(ancestor)

    def drain(self) -> Update:
        """Return everything as the last update; the registry starts again from zero."""
        with self._lock:
            ancestors = self._ancestors()
            return self._message(0, [Item(*series) for series in self.registry.lineage.drain()], ancestors)

    def for_another(self, last: Update) -> Update:
        """Return the last update for an aggregator that may not know this worker yet."""
        items = [_with_baseline(item, self.published((item.name, item.labels))) for item in last.items]
        ancestors = last.ancestors
        if self.published_seq:  # their records were published, too
            ancestors = tuple(
                ancestor._replace(items=[_with_baseline(item, item.state) for item in ancestor.items])
                for ancestor in ancestors
            )
        return last._replace(items=items, ancestors=ancestors)

    def _fold(self, whole: bool) -> list[_Series]:
        """Fold pending values; return the series that changed since the last publication.

        The timer of publications is left out if it was published just before, unless the ``whole`` is needed.
        """
        while True:
            made, revision = self.registry.made_token, self.registry.structure_token
            if (made, revision) != self._made:
                self._look_again()
                self._made = (made, revision)
            changed = [s for s in self._series.values() if not s.metric.is_unchanged_since(s.published)]
            if not whole and time.monotonic() - self._duration_published < _DURATION_SECONDS:
                changed = [series for series in changed if series.key[0] != DURATION]
            for series in changed:
                series.metric.collect()
            bad = self._series.get((REJECTED, ()))
            counted = bad is None or bad in changed or bad.metric.is_unchanged_since(bad.published)
            if counted and made is self.registry.made_token:  # else folding has found a bad value
                return changed

    def _look_again(self) -> None:
        with self._lock:
            found = {}
            for metric in self.registry.metrics():
                series = _Series(metric)
                known = self._series.get(series.key)
                found[series.key] = series if known is None or known.metric is not metric else known
            self._series = found

    def _update(self, changed: list[_Series], keyframe: bool) -> Update:
        base = 0 if keyframe else self.published_seq
        items = [
            Item(series.metric.kind, *series.key, state)
            for series in (changed if base else self._series.values())
            if (state := series.metric.state) is not series.published or not base
        ]
        return self._message(base, items, () if base else self._ancestors())

    def _message(self, base: int, items: list[Item], ancestors: tuple[Update, ...]) -> Update:
        self._seq = max(self._seq + 1, forks.now_ns())
        described = {} if base else self.registry.descriptions()
        return Update(
            self._identity, self._process, self.host, self._seq, base, items, described, ancestors,
            self.registry.max_series, forks.this_program(),
        )  # fmt: skip

    def _ancestors(self) -> tuple[Update, ...]:
        return tuple(
            Update(
                ancestor.identity, ancestor.process, self.host, ancestor.version, ancestor.base,
                [
                    Item(metric.kind, metric.name, metric.labels, state)
                    for metric in ancestor.metrics
                    if not (state := metric.collect()).is_empty
                ],
                {}, program=forks.this_program(),  # a fork does not change it
            )
            for ancestor in self.registry.lineage.ancestors
        )  # fmt: skip


def _make_baseline(ancestor: forks.Ancestor) -> None:
    for metric in ancestor.metrics:
        metric.note_baseline(metric.collect())


def _with_baseline(item: Item, published: Any) -> Item:
    """Return ``item`` with the count of the state ``published`` as its baseline."""
    if published is None or item.kind == "gauge":
        return item
    return item._replace(state=with_baseline(item.state, published.counted))


class Goodbyes:
    """The last updates of ``registry`` that no aggregator has acknowledged, whichever session sent them."""

    def __init__(self, registry: Registry) -> None:
        self._updates = _pending.setdefault(registry, [])

    def __bool__(self) -> bool:
        return bool(self._updates)

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def replace(self, update: Update, other: Update) -> None:
        self._updates[:] = [other if one is update else one for one in self._updates]

    def send(self, endpoints: Endpoints, send: Callable[[Update], Reply]) -> None:
        """Send all of them; raises AggregatorUnavailable if one of them is not acknowledged."""
        while self._updates:
            update = self._updates[0]
            if send(update).status != "ok":
                raise AggregatorUnavailable("the aggregator refused a goodbye")
            spool.discard(endpoints, Goodbye(0, update))
            with contextlib.suppress(ValueError):  # another reader may have sent it too, which is harmless
                self._updates.remove(update)

    def spool(self, endpoints: Endpoints) -> None:
        """Write them beside the socket, for the aggregator to read when it can."""
        spool.write_all(endpoints, [Goodbye(0, update) for update in self._updates])
