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
import time
from collections import deque
from typing import Callable

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
from tapes.errors import AggregatorUnavailable, TapesError, WireError
from tapes.registry import Registry
from tapes.snapshot import Snapshot

__all__ = ["AggregatorConnection", "close", "connect"]

TIMEOUT_SECONDS = 1.0
"""So long a read or a goodbye waits for the aggregator."""


def connect(registry: Registry, addr: str | None) -> None:
    """Attach a connection to ``registry``; nothing if this process has attached one already."""
    connection = registry.connection
    if isinstance(connection, AggregatorConnection) and connection.is_of_this_process:
        return
    registry.connection = AggregatorConnection(registry, resolve(addr))


def close(registry: Registry) -> None:
    """Say goodbye and detach the connection of ``registry``; nothing if there is none."""
    connection = registry.connection
    if isinstance(connection, AggregatorConnection):
        connection.close()
        registry.connection = None


class AggregatorConnection:
    """Publishes a registry and reads the merged view; belongs to the process that made it."""

    def __init__(self, registry: Registry, endpoints: Endpoints) -> None:
        self._pid = os.getpid()
        self._endpoints = endpoints
        self._correlations = itertools.count(1)
        self._readers: deque[zmq.Socket[bytes]] = deque()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outbox = Outbox(registry)
        self._publisher = Publisher(self._context, endpoints, self._outbox)
        atexit.register(self.close)

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
        """Stop publishing, and hand over the last values; takes 1 s at most if nobody answers."""
        atexit.unregister(self.close)
        if not self.is_of_this_process:
            return
        self._publisher.stop()
        with contextlib.suppress(TapesError):
            self._ask(Goodbye)
        self._context.destroy(linger=0)

    def _ask(self, question: Callable[[int, Update], Message]) -> Reply:
        if not self.is_of_this_process:
            raise AggregatorUnavailable(
                "this process was forked after its registry was connected",
                remedy="call connect() after the fork, in every worker",
            )
        deadline = time.monotonic() + TIMEOUT_SECONDS
        reader = self._readers.pop() if self._readers else self._new_reader()
        try:
            reply = self._exchange(reader, question, False, deadline)
            if reply.status == "behind":
                reply = self._exchange(reader, question, True, deadline)
        except BaseException:
            reader.close()  # a late answer must not meet the next question
            raise
        self._readers.append(reader)
        if reply.status != "ok":
            raise AggregatorUnavailable(
                f"the aggregator could not answer ({reply.payload.decode(errors='replace')})"
            )
        return reply

    def _exchange(
        self,
        reader: zmq.Socket[bytes],
        question: Callable[[int, Update], Message],
        keyframe: bool,
        deadline: float,
    ) -> Reply:
        number = next(self._correlations)
        message = question(number, self._outbox.update(keyframe=keyframe))
        self._await(reader, zmq.POLLOUT, deadline)
        reader.send(encode(message), zmq.NOBLOCK)
        while True:
            self._await(reader, zmq.POLLIN, deadline)
            reply = decode(reader.recv(zmq.NOBLOCK))
            if isinstance(reply, Reply) and reply.correlation == number:
                return reply

    def _await(self, reader: zmq.Socket[bytes], event: int, deadline: float) -> None:
        left_seconds = max(0.0, deadline - time.monotonic())
        if not reader.poll(int(left_seconds * 1000) + 1, event):
            raise AggregatorUnavailable(
                f"the aggregator at {self._endpoints.publish} did not answer within {TIMEOUT_SECONDS:g} s",
                remedy="see that it runs: RegistryAggregator(…).start(), or gunicorn -c "
                "python:tapes.contrib.gunicorn_conf",
            )

    def _new_reader(self) -> zmq.Socket[bytes]:
        reader = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.IMMEDIATE, 1), (zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_BYTES),
        ):  # fmt: skip
            reader.setsockopt(option, value)
        reader.connect(self._endpoints.read)
        return reader
