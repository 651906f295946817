"""The 0MQ context of a connection, and its sockets for questions."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import zmq

from tapes import threads
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.preflight import new_context
from tapes.distributed.transport.sockets import Socket, new_request_socket
from tapes.errors import AggregatorUnavailable, WireError

__all__ = ["SocketPool"]


class SocketPool:
    """Sockets for questions, each of which one thread uses at a time; nothing is opened before it is needed.

    Attributes:
        endpoints: Where the sockets connect to that are opened from now on.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self._idle: deque[Socket] = deque()
        self._context: zmq.Context[Socket] | None = None
        self._lock = threads.RLock()

    @property
    def context(self) -> zmq.Context[Socket]:
        """The context of all sockets; made if there is none."""
        with self._lock:
            if self._context is None:
                self._context = new_context()
            return self._context

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Socket]:
        """Yield a socket that no other thread uses; it is closed if the block fails.

        Raises:
            AggregatorUnavailable: If there can't be one, or an answer can't be read.
        """
        try:
            try:
                reader = self._idle.pop()
            except IndexError:
                reader = new_request_socket(self.context, self.endpoints)
            try:
                yield reader
            except BaseException:
                reader.close()  # a late answer must not meet the next question
                raise
        except (WireError, zmq.ZMQError) as error:
            raise AggregatorUnavailable(f"the aggregator's answer can't be used ({error})") from error
        self._idle.append(reader)

    def close(self, *, is_unused: bool) -> None:
        """Close the idle sockets, and the context too if nothing else uses it."""
        while self._idle:
            self._idle.pop().close()
        context, self._context = self._context, None
        if is_unused and context is not None:
            context.destroy(linger=0)
