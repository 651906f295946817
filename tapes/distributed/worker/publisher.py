"""The thread that publishes what a worker recorded.

It sends an update at most every 0.1 s, and a keyframe for each subscription, which arrives at every start
or restart of an aggregator. While no aggregator subscribes, it ensures that one runs. It limits itself to a
twentieth of its time. It never blocks the application: if the queue is full, the next update also carries
what this one would have. Where no thread runs in time (uWSGI without ``enable-threads``, or with
``threads``), the end of every request publishes.
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
from tapes.distributed.transport.requests import SocketPool
from tapes.distributed.transport.sockets import Socket, announced_version, new_publisher
from tapes.distributed.worker.gauge_producers import Producers
from tapes.once import OnceLogger

if TYPE_CHECKING:
    from tapes.distributed.transport.address import Endpoints
    from tapes.distributed.worker.outbox import Outbox

INTERVAL_SECONDS = 0.1  # minimum time between two updates
_SHARE = 20  # the next update waits at least this many times the duration of the last one
_LONELY_SECONDS = 5.0  # time without an aggregator after which this is logged, once
_SUBSCRIPTION_MILLISECONDS = 100  # maximum time that the end of the first request waits for a subscription
_RETRY_SECONDS = 1.0  # from one attempt to open a socket to the next

_log = logging.getLogger("tapes.distributed")


class _Channel:
    """The socket that publishes, and a pipe whose ``receiver`` wakes the thread that waits on both."""

    def __init__(self, sockets: SocketPool, endpoints: Endpoints) -> None:
        self._sockets = sockets
        self._endpoints = endpoints
        self._context: zmq.Context[Socket] | None = None
        self._sender = -1
        self.lock = threads.RLock()
        self.receiver = -1
        self.socket: Socket | None = None

    def open(self) -> None:
        """Open both; raises whatever prevents it, as no descriptor may be left."""
        try:
            self.receiver, self._sender = os.pipe()
            self._context = self._sockets.context
            self.socket = new_publisher(self._context, self._endpoints)
        except Exception:
            self._close_pipe()
            raise

    def wake(self) -> None:
        if self._sender >= 0:
            os.write(self._sender, b"w")

    def close(self) -> None:
        with self.lock:
            if self.socket is not None:
                self.socket.close()
                self.socket = None
            self._close_pipe()

    def destroy_context(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)

    def _close_pipe(self) -> None:
        for fd in {self.receiver, self._sender} - {-1}:
            os.close(fd)
        self.receiver = self._sender = -1


class Publisher:
    """Publishes ``outbox`` to ``endpoints``, in a daemon thread or at the end of every request.

    ``sockets`` owns the 0MQ context. ``follow`` is called with the new address, if the aggregator has moved.
    """

    def __init__(
        self, sockets: SocketPool, endpoints: Endpoints, outbox: Outbox, follow: Callable[[Endpoints], None]
    ) -> None:
        self._channel = _Channel(sockets, endpoints)
        self._endpoints = endpoints
        self._outbox = outbox
        self._restarter = Restarter(endpoints, follow)
        self.producers = Producers(outbox.registry)
        self._once = OnceLogger(_log)
        self._thread: threads.NativeThread | None = None
        self._at_request_end = not (threads.can_run() and threads.ends_with_a_hook())
        self._publishing = threading.Lock()
        self.is_subscribed = self._is_older = self._keyframe_due = False
        self._has_waited = self._request_ended = self._is_urgent = False
        self._is_stopped = self._is_abandoned = False
        self._end: Any = threads.unpatched("_thread", "allocate_lock")()
        self._end.acquire()

    def start(self) -> None:
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

    def publish_soon(self) -> None:
        """Have the thread publish at once; waits for nothing."""
        self._is_urgent = True
        if self._channel.lock.acquire(False):
            try:
                self._channel.wake()
            finally:
                self._channel.lock.release()

    def is_me(self) -> bool:
        return self._thread is not None and self._thread.is_me()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread; return whether it has ended. Further calls do nothing.

        A thread that does not end in time is abandoned: it destroys the context when it ends.
        """
        with self._channel.lock:
            if self._is_stopped:
                return not self._is_abandoned
            self._is_stopped = True
            self._end.release()
            self._channel.wake()
        self.producers.stop(timeout_seconds / 4)
        if self._at_request_end:
            if self._thread is not None:
                self._thread.join(timeout_seconds)
            if self._publishing.acquire(timeout=timeout_seconds):  # no request is at its end
                self._close()
                self._publishing.release()
                return True
            self._is_abandoned = True
            return False
        assert self._thread is not None
        if not self._thread.join(timeout_seconds):
            self._is_abandoned = True
            if not self._thread.join(0.0):
                return False
            self._is_abandoned = False
        return True

    def request_ended(self) -> None:
        """Publish what changed, where no thread does it in time."""
        if not self._at_request_end:
            return
        self._request_ended = True
        # If another thread is here already, it publishes this too.
        while self._request_ended and self._publishing.acquire(False):
            try:
                self._request_ended = False
                socket = None if self._is_stopped else self._open()
                if socket is None:
                    return
                if not (self.is_subscribed or self._has_waited):
                    socket.poll(_SUBSCRIPTION_MILLISECONDS)
                    self._has_waited = True  # once is enough
                self._receive_subscriptions(socket)
                self._ensure_aggregator()
                if self.is_subscribed:
                    self.producers.ensure_running()
                    self._publish()
            finally:
                self._publishing.release()

    def _open(self) -> Socket | None:
        with self._channel.lock:
            if self._channel.socket is None and not self._is_stopped:
                try:
                    self._channel.open()
                except Exception as error:
                    self._warn("tapes can't publish yet (%s)", error)
            return self._channel.socket

    def _close(self) -> None:
        self._channel.close()
        if self._is_abandoned:  # the thread that stopped it did not wait
            self._channel.destroy_context()

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                socket = self._open()
                if socket is not None:
                    self._publish_while_subscribed(socket)
                else:
                    self._end.acquire(timeout=_RETRY_SECONDS)
        finally:
            self._close()

    def _run_beside_requests(self) -> None:
        while not self._is_stopped:
            self.request_ended()
            self._end.acquire(timeout=INTERVAL_SECONDS)

    def _publish_while_subscribed(self, socket: Socket) -> None:
        """Publish until this is stopped, or no aggregator has subscribed for a while.

        Then another socket is tried: one that has met a stranger, such as an aggregator with another key,
        never connects again.
        """
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._channel.receiver, zmq.POLLIN)
        due = time.monotonic()
        patience_ends = due + _LONELY_SECONDS
        while self.is_subscribed or time.monotonic() < patience_ends:
            # 1. Wait until the next update is due, a subscription arrives, or the pipe wakes this thread.
            wait_seconds = max(0.0, due - time.monotonic())
            events = dict(poller.poll(int(wait_seconds * 1000) + 1))
            if self._channel.receiver in events:
                os.read(self._channel.receiver, 4096)
                if self._is_stopped:
                    return
            if socket in events:
                self._receive_subscriptions(socket)
            # 2. See what is due.
            started = time.monotonic()
            if self._is_urgent:
                self._is_urgent, due = False, min(due, started)
            if self.is_subscribed:
                patience_ends = started + _LONELY_SECONDS
            # 3. Publish.
            if started >= due:
                self.producers.ensure_running()
            if self.is_subscribed and (self._keyframe_due or started >= due):
                self._publish()
            # 4. Look after the aggregator, and limit the share of time that all this takes.
            if started >= due:
                self._ensure_aggregator()
                now = time.monotonic()
                due = now + max(INTERVAL_SECONDS, _SHARE * (now - started))
        self._channel.close()
        message = "tapes has found no aggregator at %s yet; it keeps looking"
        self._once.warning("lonely", message, self._endpoints.publish)

    def _ensure_aggregator(self) -> None:
        try:
            if self._is_older:
                self._restarter.replace_older()
            elif not self.is_subscribed:
                self._restarter.ensure_running()
        except Exception as error:  # a look at the file system can fail in many ways
            self._warn("tapes can't look for its aggregator (%r)", error)

    def _publish(self) -> None:
        try:
            if self._outbox.publish(self._send, keyframe=self._keyframe_due):
                self._keyframe_due = False
        except Exception as error:
            self._warn("tapes could not publish (%r)", error)

    def _warn(self, message: str, error: Exception) -> None:
        message += "; it will retry, and logs this only once"
        self._once.warning("failed", message, error, exc_info=error)

    def _receive_subscriptions(self, socket: Socket) -> None:
        while True:
            try:
                message = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            subscribes, topic = message[:1] == b"\x01", message[1:]
            version = announced_version(topic)
            if not topic:
                self.is_subscribed = self._keyframe_due = subscribes
                if subscribes:
                    self._once.forget("lonely")
                    self._restarter.note_subscription()
                    self._outbox.reset_baselines()
                else:
                    self._is_urgent = True  # look after the aggregator at once
            elif version is not None:
                self._is_older = subscribes and version < VERSION

    def _send(self, update: Update) -> bool:
        socket = self._channel.socket
        assert socket is not None
        try:
            socket.send(encode(update), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
