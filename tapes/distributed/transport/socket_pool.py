"""The 0MQ context of a connection, and its sockets for requests."""

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


class SocketPool:
    """Sockets for requests, each used by one thread at a time; opened when first needed.

    Attributes:
        endpoints: Where new sockets connect to.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self._idle: deque[Socket] = deque()
        self._context: zmq.Context[Socket] | None = None
        self._lock = threads.RLock()

    @property
    def context(self) -> zmq.Context[Socket]:
        """The context of all sockets; made when first needed."""
        with self._lock:
            if self._context is None:
                self._context = new_context()
            return self._context

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Socket]:
        """Yield a socket that no other thread uses; close it if the block fails.

        Raises AggregatorUnavailable if none can be opened, or a reply can't be read.
        """
        try:
            try:
                socket = self._idle.pop()
            except IndexError:
                socket = new_request_socket(self.context, self.endpoints)
            try:
                yield socket
            except BaseException:
                socket.close()  # a late reply must not be taken for that to the next request
                raise
        except (WireError, zmq.ZMQError) as error:
            raise AggregatorUnavailable(f"the aggregator's reply can't be used ({error})") from error
        self._idle.append(socket)

    def close(self, *, is_unused: bool) -> None:
        """Close the idle sockets; and the context, if ``is_unused`` says that no other socket is open."""
        while self._idle:
            self._idle.pop().close()
        context, self._context = self._context, None
        if is_unused and context is not None:
            context.destroy(linger=0)
