"""The worker's side of publishing: what changed, and the thread that sends it.

A thread sends an update at most every 0.1 s, and a keyframe whenever a subscription arrives, so at every
start or restart of an aggregator. It limits itself to a twentieth of its time. It never blocks the
application: a full queue means that what changed is sent next time, with what changed since. Where no thread
can be relied on (uWSGI without ``enable-threads``, or with ``threads``) the end of every request sends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Callable

import zmq

from tapes import forks, threads
from tapes.distributed.messages import Item, Update
from tapes.distributed.producers import Producers
from tapes.distributed.sockets import new_publisher
from tapes.distributed.wire import encode
from tapes.metrics import Metric, State, Timer
from tapes.metrics.origin import with_told
from tapes.naming import Labels
from tapes.registry import Registry

if TYPE_CHECKING:
    from tapes.distributed.address import Endpoints

__all__ = ["DURATION", "Outbox", "Publisher"]

DURATION = "tapes.publish.duration"
"""The timer of publications; by itself it is no reason for another one, and it is told once a second."""

INTERVAL_SECONDS = 0.1
_DURATION_SECONDS = 1.0
_SHARE = 20
_LONELY_SECONDS = 5.0
"""So long without an aggregator is worth a warning, once."""
_SUBSCRIPTION_MILLISECONDS = 100

_log = logging.getLogger("tapes.distributed")


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
        self.host = forks.host()
        self.published_seq = 0
        self._identity = registry.identity
        self._process = forks.this_process()
        self._lock = threads.RLock()
        self._seq = 0
        self._revision = -1
        self._made = (-1, -1)
        self._series: dict[tuple[str, Labels], _Series] = {}
        self._duration_told = 0.0

    def published(self, series: tuple[str, Labels]) -> State | None:
        """Return the state of a series that was published last, ``None`` if none was."""
        found = self._series.get(series)
        return None if found is None else found.told

    def update(self, *, keyframe: bool = False) -> Update:
        """Return what changed since the last publication, or everything.

        Sequence numbers are drawn under the lock that states are read under, so that the higher number
        always has the newer state.
        """
        self._fold()
        with self._lock:
            return self._update(keyframe)

    def publish(self, send: Callable[[Update], bool], *, keyframe: bool = False) -> bool:
        """Pass ``send`` what changed, if anything; it counts as published if that returns ``True``."""
        started = time.monotonic()
        if not self._fold() and not keyframe and self.registry.revision == self._revision:
            return True
        with self._lock:
            revision = self.registry.revision
            update = self._update(keyframe or revision != self._revision)
            if not send(update):
                return False
            for item in update.items:
                self._series[item.name, item.labels].told = item.state
                if item.name == DURATION:
                    self._duration_told = started
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
            for ancestor in self.registry.ancestors if self.published_seq else ():
                for metric in ancestor.metrics:
                    metric.note_told(metric.state)

    def farewell(self) -> Update:
        """Return everything as the last update; the registry starts again from zero."""
        with self._lock:
            ancestors = self._ancestors()
            items = [Item(*series) for series in self.registry.take()]
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

    def _fold(self) -> bool:
        """Fold what is pending; return whether anything changed since the last publication."""
        changed = False
        while True:
            made, revision = self.registry.made, self.registry.revision
            if (made, revision) != self._made:
                self._look_again()
                self._made = (made, revision)
            for series in self._series.values():
                if not series.metric.is_at(series.told):
                    if series.key[0] != DURATION:
                        changed = True
                    elif time.monotonic() - self._duration_told < _DURATION_SECONDS:
                        continue
                    series.metric.collect()
            if made == self.registry.made:  # else folding has found the first bad value
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

    def _update(self, keyframe: bool) -> Update:
        base = 0 if keyframe else self.published_seq
        items = [
            Item(series.metric.kind, *series.key, state)
            for series in self._series.values()
            if (state := series.metric.state) is not series.told or not base
        ]
        return self._message(base, items, () if base else self._ancestors())

    def _message(self, base: int, items: list[Item], ancestors: tuple[Update, ...]) -> Update:
        self._seq = max(self._seq + 1, forks.stamp())
        described = {} if base else self.registry.descriptions()
        return Update(
            self._identity, self._process, self.host, self._seq, base, items, described, ancestors,
            self.registry.max_series,
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
                {},
            )
            for ancestor in self.registry.ancestors
        )  # fmt: skip


def _told(item: Item, published: Any) -> Item:
    """Return ``item`` with what the state ``published`` counts as told."""
    if published is None or item.kind == "gauge":
        return item
    return item._replace(state=with_told(item.state, published.counted))


class Publisher:
    """Publishes an outbox: a daemon thread of its own does, or the end of every request."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoints: Endpoints, outbox: Outbox):
        self._context = context
        self._outbox = outbox
        self._socket = new_publisher(context, endpoints)
        self._subscribed = False
        self._keyframe_due = False
        self._failed = False
        self._abandoned = False
        self._address = endpoints.publish
        self._receiver, self._sender = os.pipe()
        self._producers = Producers(outbox.registry)
        self._thread: threads.Worker | None = threads.Worker(self._run, "tapes-publisher")
        self._alone = threading.Lock()
        self._request_ended = False
        self._stopping = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        """Start the thread, if threads run here."""
        try:
            if threads.can_be_relied_on() and self._thread is not None:
                self._thread.start()
                return
        except RuntimeError:
            _log.info("tapes publishes at the end of every request, as no thread can be started")
        self._thread = None
        self._outbox.registry.tells_at_request_end = True

    @property
    def is_subscribed(self) -> bool:
        """Whether an aggregator listens, as far as is known."""
        return self._subscribed

    def is_me(self) -> bool:
        """Return whether it is the publisher's thread that asks."""
        return self._thread is not None and self._thread.is_me()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread; return whether it has ended.

        If it is held up it is left to itself, and destroys the context at its end. Once is enough.
        """
        with self._stopping:
            if self._stopped:
                return not self._abandoned
            self._stopped = True
        self._producers.stop(timeout_seconds / 4)
        if self._thread is None:
            if self._alone.acquire(timeout=timeout_seconds):  # nobody is at the end of a request
                self._close()
                self._alone.release()
                return True
            self._abandoned = True
            return False
        os.write(self._sender, b"s")
        if not self._thread.join(timeout_seconds):
            self._abandoned = True
            if not self._thread.join(0.0):
                return False
            self._abandoned = False
        os.close(self._sender)
        os.close(self._receiver)
        return True

    def request_ended(self) -> None:
        """Publish what changed, where no thread does."""
        if self._thread is not None:
            return
        self._request_ended = True
        # If another thread is here already, it publishes this too.
        while self._request_ended and self._alone.acquire(False):
            try:
                self._request_ended = False
                if self._stopped:
                    return
                if not self._subscribed:
                    self._socket.poll(_SUBSCRIPTION_MILLISECONDS)
                self._note_subscriptions()
                if self._subscribed:
                    self._producers.tend()
                    self._keyframe_due = not self._publish() and self._keyframe_due
            finally:
                self._alone.release()

    def await_producers(self) -> None:
        """Wait for producers of gauges that never ran yet; 0.2 s at most."""
        self._producers.await_first()

    def _close(self) -> None:
        self._socket.close()
        os.close(self._sender)
        os.close(self._receiver)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._receiver, zmq.POLLIN)
        due = time.monotonic()
        patience_ends = due + _LONELY_SECONDS
        try:
            while True:
                wait_seconds = max(0.0, due - time.monotonic())
                events = dict(poller.poll(int(wait_seconds * 1000) + 1))
                if self._receiver in events:
                    return
                if self._socket in events:
                    self._note_subscriptions()
                started = time.monotonic()
                if started > patience_ends and not self._subscribed:
                    patience_ends = float("inf")
                    _log.warning("tapes has found no aggregator at %s yet; it goes on looking", self._address)
                if started >= due:
                    self._producers.tend()
                if self._subscribed and (self._keyframe_due or started >= due):
                    sent = self._publish()
                    self._keyframe_due = self._keyframe_due and not sent
                if started >= due:
                    now = time.monotonic()
                    due = now + max(INTERVAL_SECONDS, _SHARE * (now - started))
        finally:
            self._socket.close()
            if self._abandoned:  # whoever stopped it did not wait
                os.close(self._sender)
                os.close(self._receiver)
                self._context.destroy(linger=0)

    def _publish(self) -> bool:
        try:
            return self._outbox.publish(self._send, keyframe=self._keyframe_due)
        except Exception:
            if not self._failed:
                self._failed = True
                _log.exception("tapes could not publish; it goes on trying, and says so only once")
            return False

    def _note_subscriptions(self) -> None:
        while True:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            subscribes, topic = message[:1] == b"\x01", message[1:]
            if not topic:
                self._subscribed = self._keyframe_due = subscribes
                if subscribes:
                    self._outbox.begin_anew()

    def _send(self, update: Update) -> bool:
        try:
            self._socket.send(encode(update), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
