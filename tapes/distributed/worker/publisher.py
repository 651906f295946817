"""The thread that sends what a worker has to say.

It sends an update at most every 0.1 s, and a keyframe whenever a subscription arrives, so at every start or
restart of an aggregator; while nobody listens, it sees to it that there is one again. It limits itself to a
twentieth of its time. It never blocks the application: a full queue means that what changed is sent next
time, with what changed since. Where no thread can be relied on (uWSGI without ``enable-threads``, or with
``threads``) the end of every request sends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from tapes import threads
from tapes.distributed.protocol.messages import Update
from tapes.distributed.protocol.wire import VERSION, encode
from tapes.distributed.supervision.restart import Restarter
from tapes.distributed.transport.socket_pool import SocketPool
from tapes.distributed.transport.sockets import Socket, announced_version, new_publisher
from tapes.distributed.worker.gauge_producers import Producers

if TYPE_CHECKING:
    from tapes.distributed.transport.address import Endpoints
    from tapes.distributed.worker.outbox import Outbox

__all__ = ["Publisher"]

INTERVAL_SECONDS = 0.1
_SHARE = 20
_LONELY_SECONDS = 5.0
"""So long without an aggregator is worth a warning, once."""
_SUBSCRIPTION_MILLISECONDS = 100
_RETRY_SECONDS = 1.0
"""So long after no socket could be opened another one is tried."""

_log = logging.getLogger("tapes.distributed")


class Publisher:
    """Publishes an outbox: a daemon thread of its own does, or the end of every request.

    Args:
        readers, endpoints, outbox: Who has the context, where to publish, and what.
        follow: Called with where the aggregator is by now, if it has moved.
    """

    def __init__(
        self,
        readers: SocketPool,
        endpoints: Endpoints,
        outbox: Outbox,
        follow: Callable[[Endpoints], None],
    ) -> None:
        self._readers = readers
        self._context: zmq.Context[Socket] | None = None
        self._outbox = outbox
        self._endpoints = endpoints
        self._reviver = Restarter(endpoints, follow)
        self._socket: Socket | None = None
        self._receiver = self._sender = -1
        self._has_waited = self._was_lonely = False
        self._subscribed = self._is_older = False
        self._keyframe_due = False
        self._failed = False
        self._abandoned = False
        self._producers = Producers(outbox.registry)
        self._thread: threads.NativeThread | None = None
        self._at_request_end = not (threads.can_run() and threads.ends_with_a_hook())
        self._alone = threading.Lock()
        self._request_ended = self._is_urgent = False
        self._stopping = threads.RLock()
        self._stopped = False
        self._end: Any = threads.unpatched("_thread", "allocate_lock")()
        self._end.acquire()

    def start(self) -> None:
        """Start the thread, if threads run here."""
        if threads.can_run():
            run = self._run_beside_requests if self._at_request_end else self._run
            self._thread = threads.NativeThread(run, "tapes-publisher")
            try:
                self._thread.start()
            except RuntimeError:
                _log.info("tapes publishes at the end of every request, as no thread can be started")
                self._thread, self._at_request_end = None, True
        if self._at_request_end:
            self._outbox.registry.session.flush_per_request = True

    def hurry(self) -> None:
        """Have the thread publish at once; waits for nothing."""
        self._is_urgent = True
        if self._stopping.acquire(False):
            try:
                if self._sender >= 0:
                    os.write(self._sender, b"h")
            finally:
                self._stopping.release()

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
            self._end.release()
            if self._sender >= 0:
                os.write(self._sender, b"s")
        self._producers.stop(timeout_seconds / 4)
        if self._thread is not None and self._at_request_end:
            self._thread.join(timeout_seconds)
        if self._at_request_end:
            if self._alone.acquire(timeout=timeout_seconds):  # nobody is at the end of a request
                self._close()
                self._alone.release()
                return True
            self._abandoned = True
            return False
        assert self._thread is not None
        if not self._thread.join(timeout_seconds):
            self._abandoned = True
            if not self._thread.join(0.0):
                return False
            self._abandoned = False
        return True

    def request_ended(self) -> None:
        """Publish what changed, where no thread can be relied on."""
        if not self._at_request_end:
            return
        self._request_ended = True
        # If another thread is here already, it publishes this too.
        while self._request_ended and self._alone.acquire(False):
            try:
                self._request_ended = False
                if self._stopped or not self._open():
                    return
                assert self._socket is not None
                if not (self._subscribed or self._has_waited):
                    self._socket.poll(_SUBSCRIPTION_MILLISECONDS)
                    self._has_waited = True  # once is enough
                self._note_subscriptions(self._socket)
                self._see_to_the_aggregator()
                if self._subscribed:
                    self._producers.tend()
                    self._keyframe_due = not self._publish() and self._keyframe_due
            finally:
                self._alone.release()

    def await_producers(self) -> None:
        """Wait for producers of gauges that have not run yet; 0.5 s at most."""
        self._producers.await_first()

    def _open(self) -> bool:
        """Open the socket, if it isn't; return whether there is one, as descriptors may have run out."""
        with self._stopping:
            if self._socket is None and not self._stopped:
                try:
                    self._receiver, self._sender = os.pipe()
                    self._context = self._readers.context
                    self._socket = new_publisher(self._context, self._endpoints)
                except Exception as error:
                    self._close_pipe()
                    self._warn(
                        "tapes can't publish yet (%s); it keeps trying, and logs this only once", error
                    )
            return self._socket is not None

    def _close(self) -> None:
        self._close_socket()
        if self._abandoned and self._context is not None:  # the thread that stopped it did not wait
            self._context.destroy(linger=0)

    def _close_socket(self) -> None:
        with self._stopping:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            self._close_pipe()

    def _close_pipe(self) -> None:
        for fd in {self._receiver, self._sender} - {-1}:
            os.close(fd)
        self._receiver = self._sender = -1

    def _run(self) -> None:
        try:
            while not self._stopped:
                if self._open():
                    assert self._socket is not None
                    self._publish_while_heard(self._socket)
                else:
                    self._end.acquire(timeout=_RETRY_SECONDS)
        finally:
            self._close()

    def _run_beside_requests(self) -> None:
        """Do what the end of a request does, for a process that may have none for long."""
        while not self._stopped:
            self.request_ended()
            self._end.acquire(timeout=INTERVAL_SECONDS)

    def _publish_while_heard(self, publisher: Socket) -> None:
        """Publish until this is stopped, or nobody has listened for long.

        Another socket is tried then: one that has met a stranger, such as an aggregator with another key,
        never connects again.
        """
        poller = zmq.Poller()
        poller.register(publisher, zmq.POLLIN)
        poller.register(self._receiver, zmq.POLLIN)
        due = time.monotonic()
        patience_ends = due + _LONELY_SECONDS
        while self._subscribed or time.monotonic() < patience_ends:
            wait_seconds = max(0.0, due - time.monotonic())
            events = dict(poller.poll(int(wait_seconds * 1000) + 1))
            if self._receiver in events:
                os.read(self._receiver, 4096)
                if self._stopped:
                    return
            if publisher in events:
                self._note_subscriptions(publisher)
            started = time.monotonic()
            if self._is_urgent:
                self._is_urgent, due = False, min(due, started)
            if self._subscribed:
                patience_ends = started + _LONELY_SECONDS
            if started >= due:
                self._producers.tend()
            if self._subscribed and (self._keyframe_due or started >= due):
                sent = self._publish()
                self._keyframe_due = self._keyframe_due and not sent
            if started >= due:
                self._see_to_the_aggregator()
                now = time.monotonic()
                due = now + max(INTERVAL_SECONDS, _SHARE * (now - started))
        self._close_socket()
        if not self._was_lonely:
            self._was_lonely = True
            _log.warning(
                "tapes has found no aggregator at %s yet; it goes on looking", self._endpoints.publish
            )

    def _see_to_the_aggregator(self) -> None:
        try:
            if self._is_older:
                self._reviver.replace_older()
            elif not self._subscribed:
                self._reviver.ensure_running()
        except Exception as error:  # a look at the file system can fail in many ways
            self._warn(
                "tapes can't look for its aggregator (%r); it keeps trying, and logs this only once", error
            )

    def _publish(self) -> bool:
        try:
            return self._outbox.publish(self._send, keyframe=self._keyframe_due)
        except Exception as error:
            self._warn("tapes could not publish (%r); it keeps trying, and logs this only once", error)
            return False

    def _warn(self, what: str, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            _log.warning(what, error, exc_info=error)

    def _note_subscriptions(self, publisher: Socket) -> None:
        while True:
            try:
                message = publisher.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            subscribes, topic = message[:1] == b"\x01", message[1:]
            version = announced_version(topic)
            if not topic:
                self._subscribed = self._keyframe_due = subscribes
                if subscribes:
                    self._was_lonely = False
                    self._reviver.note_subscription()
                    self._outbox.begin_anew()
            elif version is not None:
                self._is_older = subscribes and version < VERSION

    def _send(self, update: Update) -> bool:
        try:
            assert self._socket is not None
            self._socket.send(encode(update), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
