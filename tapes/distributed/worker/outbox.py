"""What a worker has to say: its series, and which of them changed since it last said so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tapes import forks, processes, threads
from tapes.distributed.protocol.messages import ALIVE_SECONDS, Item, Update
from tapes.metrics import Metric, State, Timer
from tapes.metrics.origin import with_told
from tapes.naming import Labels
from tapes.processes import lives
from tapes.registry import Registry
from tapes.rejections import REJECTED

__all__ = ["DURATION", "Outbox"]

DURATION = "tapes.publish.duration"
"""The timer of publications; by itself it is no reason for another one, and it is told once a second."""

_DURATION_SECONDS = 1.0


class _Series:
    """A metric, and the state of it that was published last."""

    __slots__ = ("key", "metric", "told")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.key = (metric.name, metric.labels)
        self.told: State | None = None


class Outbox:
    """What a worker has to say: its series, and which of them changed since the last publication.

    States are immutable and a series that was not touched keeps its state object, so "changed" is "another
    object than was published". What is pending is folded before the lock is taken, as folding may log; under
    the lock nothing waits, but in the last words.
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
        self._duration_told = self._sent = 0.0

    def published(self, series: tuple[str, Labels]) -> State | None:
        """Return the state of a series that was published last, ``None`` if none was."""
        found = self._series.get(series)
        return None if found is None else found.told

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

        Now and then also nothing, to say that this process lives.
        """
        started = time.monotonic()
        whole = keyframe or self.registry.structure_token is not self._revision
        changed = self._fold(whole)
        is_due = whole or started - self._sent > ALIVE_SECONDS
        if not is_due and all(series.key[0] == DURATION for series in changed):
            return True
        with self._lock:
            revision = self.registry.structure_token
            update = self._update(changed, whole or revision is not self._revision)
            if not send(update):
                return False
            for item in update.items:
                self._series[item.name, item.labels].told = item.state
                if item.name == DURATION:
                    self._duration_told = started
            self._sent = started
            self.published_seq = update.seq
            self._revision = revision
        self.registry.own(Timer, DURATION).update(time.monotonic() - started)
        return True

    def begin_anew(self) -> None:
        """Note that who subscribes may be another aggregator: what was published, the one before was told."""
        with self._lock:
            for series in self._series.values():
                if series.told is not None:
                    series.metric.note_told(series.told)
            for ancestor in self.registry.lineage.ancestors if self.published_seq else ():
                _note_told(ancestor)

    def begin(self, *, is_another_aggregator: bool) -> None:
        """Note, before the first update, of which ancestors an aggregator may have been told already.

        One that was connected may have told an earlier aggregator what this process inherited; and if it
        lives, what it says itself stands.
        """
        for ancestor in self.registry.lineage.ancestors:
            if ancestor.is_connected and (is_another_aggregator or lives(ancestor.process)):
                _note_told(ancestor)

    def drain(self) -> Update:
        """Return everything as the last update; the registry starts again from zero."""
        with self._lock:
            ancestors = self._ancestors()
            items = [Item(*series) for series in self.registry.lineage.drain()]
            return self._message(0, items, ancestors)

    def for_another(self, farewell: Update) -> Update:
        """Return the last update as it is to be said to an aggregator that heard of none before it."""
        items = [_told(item, self.published((item.name, item.labels))) for item in farewell.items]
        ancestors = farewell.ancestors
        if self.published_seq:  # with all that is known of them
            ancestors = tuple(
                ancestor._replace(items=[_told(item, item.state) for item in ancestor.items])
                for ancestor in ancestors
            )
        return farewell._replace(items=items, ancestors=ancestors)

    def _fold(self, whole: bool) -> list[_Series]:
        """Fold what is pending; return what changed since the last publication.

        Unless the ``whole`` is to be told, how long publications took is told seldom.
        """
        while True:
            made, revision = self.registry.made_token, self.registry.structure_token
            if (made, revision) != self._made:
                self._look_again()
                self._made = (made, revision)
            changed = [s for s in self._series.values() if not s.metric.is_unchanged_since(s.told)]
            if not whole and time.monotonic() - self._duration_told < _DURATION_SECONDS:
                changed = [series for series in changed if series.key[0] != DURATION]
            for series in changed:
                series.metric.collect()
            bad = self._series.get((REJECTED, ()))
            counted = bad is None or bad in changed or bad.metric.is_unchanged_since(bad.told)
            if counted and made is self.registry.made_token:  # else folding has found a bad value
                return changed

    def _look_again(self) -> None:
        """Take notice of metrics that were made and removed."""
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
            if (state := series.metric.state) is not series.told or not base
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


def _note_told(ancestor: forks.Ancestor) -> None:
    for metric in ancestor.metrics:
        metric.note_told(metric.collect())


def _told(item: Item, published: Any) -> Item:
    """Return ``item`` with what the state ``published`` counts as told."""
    if published is None or item.kind == "gauge":
        return item
    return item._replace(state=with_told(item.state, published.counted))
