"""The worker's side of publishing: what changed, and the thread that sends it.

A thread sends an update at most every 0.1 s, and a keyframe whenever a subscription arrives, so at every
start or restart of an aggregator. It limits itself to a twentieth of its time. It never blocks the
application: a full queue means that what changed is sent next time, with what changed since.

0MQ settings, and why: ``IMMEDIATE``, as otherwise an XPUB that connects notices neither the death nor the
return of its subscriber; ``XPUB_NODROP`` and a short queue, as otherwise a full queue drops the newest
message without a word; ``XPUB_VERBOSE``, so that a second subscription is seen while the first still lingers.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Callable

import zmq

from tapes.distributed.wire import Item, Update, encode
from tapes.metrics import State
from tapes.naming import Labels
from tapes.registry import Registry

if TYPE_CHECKING:
    from tapes.distributed.address import Endpoints

__all__ = ["Outbox", "Publisher"]

INTERVAL_SECONDS = 0.1
_SHARE = 20
_LONELY_SECONDS = 5.0
"""So long without an aggregator is worth a warning, once."""
_PRODUCED_SECONDS = 1.0
"""So long a value that a gauge's producer gave is good for."""
_QUEUE = 4

_log = logging.getLogger("tapes.distributed")


class Outbox:
    """What a worker has to say: its series, and which of them changed since the last publication.

    States are immutable and a series that was not touched keeps its state object, so "changed" is "another
    object than was published".
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._identity = os.urandom(16)
        self._pid = os.getpid()
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._seq = 0
        self._published_seq = 0
        self._published: dict[tuple[str, Labels], State] = {}
        self._revision = -1

    def update(self, *, keyframe: bool = False) -> Update:
        """Return what changed since the last publication, or everything.

        Sequence numbers are drawn under the lock that states are collected under, so that the higher
        number always has the newer state.
        """
        self._registry.refresh(_PRODUCED_SECONDS)
        with self._lock:
            return self._update(keyframe)

    def publish(self, send: Callable[[Update], bool], *, keyframe: bool = False) -> bool:
        """Pass ``send`` what changed, if anything; it counts as published if that returns ``True``."""
        self._registry.refresh(_PRODUCED_SECONDS)
        with self._lock:
            revision = self._registry.revision
            update = self._update(keyframe or revision != self._revision)
            if update.base and not update.items:
                return True
            if not send(update):
                return False
            if not update.base:
                self._published.clear()
            self._published.update(((item.name, item.labels), item.state) for item in update.items)
            self._published_seq = update.seq
            self._revision = revision
            return True

    def farewell(self) -> Update:
        """Return everything as the last update; the registry starts again from zero."""
        with self._lock:
            self._seq += 1
            items = [Item(*series) for series in self._registry.take()]
            return self._message(0, items)

    def _update(self, keyframe: bool) -> Update:
        base = 0 if keyframe else self._published_seq
        published = self._published.get if base else lambda key: None
        self._seq += 1
        items = [
            Item(kind, name, labels, state)
            for kind, name, labels, state in self._registry.collect()
            if published((name, labels)) is not state
        ]
        return self._message(base, items)

    def _message(self, base: int, items: list[Item]) -> Update:
        described = {} if base else self._registry.descriptions()
        return Update(self._identity, self._pid, self._host, self._seq, base, items, described)


class Publisher:
    """A daemon thread that publishes an outbox until it is stopped."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoints: Endpoints, outbox: Outbox):
        self._context = context
        self._outbox = outbox
        self._socket = context.socket(zmq.XPUB)
        for option, value in (
            (zmq.IMMEDIATE, 1), (zmq.XPUB_NODROP, 1), (zmq.XPUB_VERBOSE, 1),
            (zmq.SNDHWM, _QUEUE), (zmq.LINGER, 0),
        ):  # fmt: skip
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoints.publish))
        self._socket.connect(endpoints.publish)
        self._subscribed = False
        self._keyframe_due = False
        self._failed = False
        self._abandoned = False
        self._address = endpoints.publish
        self._stop_sender, self._stop_receiver = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="tapes-publisher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread; return whether it has ended.

        If it is held up, by a producer of a gauge, it is left to itself, and destroys the context at its end.
        """
        self._stop_sender.send(b"x")
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._abandoned = True
        if self._thread.is_alive():
            return False
        self._stop_sender.close()
        self._stop_receiver.close()
        return True

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_receiver, zmq.POLLIN)
        due = time.monotonic()
        patience_ends = due + _LONELY_SECONDS
        try:
            while True:
                wait_seconds = max(0.0, due - time.monotonic())
                events = dict(poller.poll(int(wait_seconds * 1000) + 1))
                if self._stop_receiver.fileno() in events:
                    return
                if self._socket in events:
                    self._note_subscriptions()
                started = time.monotonic()
                if started > patience_ends and not self._subscribed:
                    patience_ends = float("inf")
                    _log.warning("tapes has found no aggregator at %s yet; it goes on looking", self._address)
                if self._subscribed and (self._keyframe_due or started >= due):
                    sent = self._publish()
                    self._keyframe_due = self._keyframe_due and not sent
                if started >= due:
                    now = time.monotonic()
                    due = now + max(INTERVAL_SECONDS, _SHARE * (now - started))
        finally:
            self._socket.close()
            if self._abandoned:  # whoever stopped it did not wait
                self._stop_sender.close()
                self._stop_receiver.close()
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
            self._subscribed = message[:1] == b"\x01"
            self._keyframe_due = self._subscribed

    def _send(self, update: Update) -> bool:
        try:
            self._socket.send(encode(update), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
