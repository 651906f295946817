"""A registry's connection to an aggregator: publishing, reading for the whole service, and leaving.

A read carries what this process holds, as a separate publication could be overtaken by it. It presumes that
the aggregator has everything published before; if some of that is still under way, the aggregator says so
and gets a keyframe. So a reader always sees its own events.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
import weakref
from collections import deque
from typing import Any, Callable, TypeVar

import zmq

from tapes.distributed.address import Endpoints, resolve
from tapes.distributed.ledger import snapshot_of
from tapes.distributed.publisher import Outbox, Publisher
from tapes.distributed.wire import (
    MAX_BYTES,
    Goodbye,
    Merged,
    Message,
    Read,
    Reply,
    Update,
    decode,
    encode,
)
from tapes.errors import AggregatorUnavailable, InvalidArgument, WireError
from tapes.registry import Registry
from tapes.snapshot import Snapshot

__all__ = ["AggregatorConnection", "close", "connect"]

T = TypeVar("T")

TIMEOUT_SECONDS = 1.0
"""So long a read or a goodbye waits for the aggregator."""


def connect(registry: Registry, addr: str | None) -> None:
    """Attach a connection to ``registry``; nothing if this process has attached the same already."""
    endpoints = resolve(addr)
    with _connecting:
        connection = registry.connection
        if isinstance(connection, AggregatorConnection) and connection.is_of_this_process:
            if connection.endpoints != endpoints:
                raise InvalidArgument(
                    "connect()", got=endpoints.publish, expected=f"{connection.endpoints.publish}, as before",
                    remedy="call close() first",
                )  # fmt: skip
            return
        connection = AggregatorConnection(registry, endpoints)
        registry.connection = connection
        connection.start()


def close(registry: Registry) -> None:
    """Say goodbye and detach the connection of ``registry``; nothing if there is none."""
    connection = registry.connection
    if isinstance(connection, AggregatorConnection):
        connection.close()
        registry.connection = None


_connecting = threading.Lock()
_unsaid: weakref.WeakKeyDictionary[Registry, list[Update]] = weakref.WeakKeyDictionary()
"""Goodbyes of earlier connections of a registry that nobody has acknowledged."""


def _after_fork() -> None:
    """Start afresh in a forked child: what is unsaid is its parent's to say, and its lock may be held."""
    global _connecting
    _connecting = threading.Lock()
    _unsaid.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class AggregatorConnection:
    """Publishes a registry and reads the merged view; belongs to the process that made it."""

    def __init__(self, registry: Registry, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self._registry = registry
        self._pid = os.getpid()
        self._closing = False
        self._in_flight = 0
        self._changed = threading.Condition()
        self._correlations = itertools.count(1)
        self._readers: deque[zmq.Socket[bytes]] = deque()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outbox = Outbox(registry)
        self._publisher = Publisher(self._context, endpoints, self._outbox)
        self._finalizer: Any = None

    def start(self) -> None:
        """Begin to publish, and say goodbye at the end of the interpreter."""
        self._publisher.start()
        atexit.register(self.close)
        multiprocessing_util: Any = sys.modules.get("multiprocessing.util")
        if multiprocessing_util is not None:  # its children run no atexit functions
            self._finalizer = multiprocessing_util.Finalize(None, self.close, exitpriority=100)

    @property
    def is_of_this_process(self) -> bool:
        """Whether this process made it, and not one that this one was forked from."""
        return self._pid == os.getpid()

    def snapshot(self) -> Snapshot:
        """Return the merged view.

        Raises:
            AggregatorUnavailable: If the aggregator doesn't answer within a second.
        """
        merged = decode(self.render("states"))
        if not isinstance(merged, Merged):
            raise WireError("the aggregator's answer", got=type(merged).__name__, expected="Merged")
        return snapshot_of(merged)

    def render(self, form: str) -> bytes:
        """Return the merged view, written by the aggregator; raises as `snapshot`."""
        return self._ask(lambda number, update: Read(number, form, update)).payload

    def close(self) -> None:
        """Stop publishing, and hand over the last values; takes 1 s at most if nobody answers.

        What was handed over is no longer here: the registry starts again from zero. If nobody acknowledges
        it, it is kept, and handed over by the next connection of this registry.
        """
        atexit.unregister(self.close)
        if self._finalizer is not None:
            self._finalizer.cancel()
        if not self.is_of_this_process:
            return
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with self._changed:
            if self._closing:
                return
            self._closing = True
            idle = self._changed.wait_for(lambda: not self._in_flight, TIMEOUT_SECONDS)
        ended = self._publisher.stop(max(0.0, deadline - time.monotonic()))
        _unsaid.setdefault(self._registry, []).append(self._outbox.farewell())
        with contextlib.suppress(AggregatorUnavailable):
            self._on_a_reader(self._say_goodbyes, deadline)
        while self._readers:
            self._readers.pop().close()
        if ended and (idle or not self._in_flight):  # nobody else uses a socket
            self._context.destroy(linger=0)

    def _ask(self, question: Callable[[int, Update], Message]) -> Reply:
        if not self.is_of_this_process:
            raise AggregatorUnavailable(
                "this process was forked after its registry was connected",
                remedy="call connect() after the fork, in every worker",
            )
        with self._changed:
            if self._closing:
                raise AggregatorUnavailable("the connection is being closed")
            self._in_flight += 1
        try:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            return self._on_a_reader(lambda reader, end: self._put(question, reader, end), deadline)
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def _on_a_reader(self, talk: Callable[[zmq.Socket[bytes], float], T], deadline: float) -> T:
        """Return what ``talk`` returns, given a socket that nobody else uses."""
        try:
            reader = self._readers.pop() if self._readers else self._new_reader()
            try:
                result = talk(reader, deadline)
            except BaseException:
                reader.close()  # a late answer must not meet the next question
                raise
        except (WireError, zmq.ZMQError) as error:
            raise AggregatorUnavailable(f"the aggregator's answer can't be used ({error})") from error
        self._readers.append(reader)
        return result

    def _put(
        self, question: Callable[[int, Update], Message], reader: zmq.Socket[bytes], deadline: float
    ) -> Reply:
        self._say_goodbyes(reader, deadline)
        for keyframe in (False, True):
            number = next(self._correlations)
            message = question(number, self._outbox.update(keyframe=keyframe))
            reply = self._exchange(reader, number, message, deadline)
            if reply.status != "behind":
                break
        if reply.status != "ok":
            raise AggregatorUnavailable(
                f"the aggregator could not answer ({reply.payload.decode(errors='replace')})"
            )
        return reply

    def _say_goodbyes(self, reader: zmq.Socket[bytes], deadline: float) -> None:
        unsaid = _unsaid.get(self._registry, [])
        while unsaid:
            goodbye, number = unsaid[0], next(self._correlations)
            self._exchange(reader, number, Goodbye(number, goodbye), deadline)
            with contextlib.suppress(ValueError):  # another reader may have said it too, which is harmless
                unsaid.remove(goodbye)

    def _exchange(self, reader: zmq.Socket[bytes], number: int, message: Message, deadline: float) -> Reply:
        data = encode(message)
        self._await(reader, zmq.POLLOUT, deadline)
        reader.send(data, zmq.NOBLOCK)
        while True:
            self._await(reader, zmq.POLLIN, deadline)
            reply = decode(reader.recv(zmq.NOBLOCK))
            # A question that could not be read is answered with number 0.
            if isinstance(reply, Reply) and reply.correlation in (number, 0):
                return reply

    def _await(self, reader: zmq.Socket[bytes], event: int, deadline: float) -> None:
        left_seconds = max(0.0, deadline - time.monotonic())
        if not reader.poll(int(left_seconds * 1000) + 1, event):
            raise AggregatorUnavailable(
                f"the aggregator at {self.endpoints.publish} did not answer within {TIMEOUT_SECONDS:g} s",
                remedy="see that it runs: RegistryAggregator(…).start(), or gunicorn -c "
                "python:tapes.contrib.gunicorn_conf, restarted if its aggregator was killed",
            )

    def _new_reader(self) -> zmq.Socket[bytes]:
        reader = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.IMMEDIATE, 1), (zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_BYTES),
        ):  # fmt: skip
            reader.setsockopt(option, value)
        reader.setsockopt(zmq.IPV6, int("[" in self.endpoints.read))
        reader.connect(self.endpoints.read)
        return reader
