"""One request to the aggregator, its reply, and the sockets for both."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator

import zmq

from tapes import threads
from tapes.distributed.protocol.messages import WAIT, Attach, Flush, Goodbye, HandOver, Read, Reply
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.preflight import new_context
from tapes.distributed.transport.sockets import Socket, new_request_socket
from tapes.errors import AggregatorUnavailable, WireError
from tapes.processes import Process, host_id

Request = Read | Attach | Goodbye | Flush | HandOver

TIMEOUT_SECONDS = 1.0  # time to wait for the reply to a request
MAX_WAIT_SECONDS = 10.0  # maximum time to wait for a reply that the aggregator is preparing
_POLL_MILLISECONDS = 100


class OlderAggregator(AggregatorUnavailable):
    """The aggregator uses an older version of the wire and can't read the request."""


class SocketPool:
    """Sockets for requests to ``endpoints``, each used by one thread at a time; opened when first needed."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self._idle: deque[Socket] = deque()
        self._context: zmq.Context[Socket] | None = None
        self._lock = threads.RLock()

    @property
    def context(self) -> zmq.Context[Socket]:
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
        """Close the idle sockets; and the context, if ``is_unused`` means that no other socket is open."""
        while self._idle:
            self._idle.pop().close()
        context, self._context = self._context, None
        if is_unused and context is not None:
            context.destroy(linger=0)


def request(endpoints: Endpoints, socket: Socket, message: Request, deadline: float) -> Reply:
    """Send ``message`` and return the reply.

    If another aggregator replaces the one that got the message, it gets the message too: every request may be
    repeated. While the aggregator prepares a long reply, ``deadline`` is extended, to 10 s at most. Raises
    AggregatorUnavailable if there is not a reply by then, OlderAggregator, or WireError for the reply.
    """
    data = encode(message)
    latest = time.monotonic() + MAX_WAIT_SECONDS
    receiver = incarnation(endpoints)
    _send(endpoints, socket, data, deadline)
    while True:
        left = max(0.0, deadline - time.monotonic())
        if socket.poll(min(_POLL_MILLISECONDS, int(left * 1000) + 1), zmq.POLLIN):
            received = _receive(socket)
            if not isinstance(message, HandOver) and len(received) > 1 and received[1] < VERSION:
                raise OlderAggregator(
                    f"the aggregator at {endpoints.publish} is of an older version of tapes",
                    remedy="restart the process that started it",
                )
            reply = decode(received)
            # The reply to a message that could not be read has number 0.
            if isinstance(reply, Reply) and reply.correlation in (message.correlation, 0):
                if reply.status != WAIT:
                    return reply
                deadline = max(deadline, min(time.monotonic() + TIMEOUT_SECONDS, latest))
        elif not left:
            raise _unanswered(endpoints)
        elif receiver != (current := incarnation(endpoints)):
            receiver = current
            _send(endpoints, socket, data, deadline)


def request_all(endpoints: Endpoints, messages: Iterable[Request]) -> bool:
    """Send messages on a new socket, each after the reply to the last; return whether all succeed."""
    context = new_context()
    try:
        with contextlib.closing(new_request_socket(context, endpoints)) as socket:
            return all(
                request(endpoints, socket, message, time.monotonic() + TIMEOUT_SECONDS).status == "ok"
                for message in messages
            )
    finally:
        context.destroy(linger=0)


def keep_alive_for(endpoints: Endpoints, *clients: Process) -> bool:
    """Ask the aggregator to live as long as ``clients``; return whether it agreed. Raises OlderAggregator."""
    return _request_once(endpoints, Attach(1, host_id(), clients))


def request_hand_over(endpoints: Endpoints) -> bool:
    """Ask an aggregator of an older version to hand over and exit; return whether it agreed."""
    return _request_once(endpoints, HandOver(1, VERSION))


def flush(endpoints: Endpoints) -> bool:
    """Have the aggregator's reporters report now; return whether they have, within a second."""
    with contextlib.suppress(OlderAggregator):  # it can't do this
        return _request_once(endpoints, Flush(1))
    return False


def incarnation(endpoints: Endpoints) -> tuple[int, int] | None:
    """Return a value that differs between an aggregator and the next one; ``None`` if it is not known."""
    try:
        found = os.stat(endpoints.lock or "")
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _request_once(endpoints: Endpoints, message: Request) -> bool:
    try:
        return request_all(endpoints, [message])
    except OlderAggregator:
        raise
    except (AggregatorUnavailable, WireError, zmq.ZMQError):
        return False


def _send(endpoints: Endpoints, socket: Socket, data: bytes, deadline: float) -> None:
    left = max(0.0, deadline - time.monotonic())
    if not socket.poll(int(left * 1000) + 1, zmq.POLLOUT):
        raise _unanswered(endpoints)
    socket.send(data, zmq.NOBLOCK)


def _receive(socket: Socket) -> memoryview | bytes:
    parts = [frame.buffer for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unanswered(endpoints: Endpoints) -> AggregatorUnavailable:
    return AggregatorUnavailable(
        f"the aggregator at {endpoints.publish} did not answer within {TIMEOUT_SECONDS:g} s",
        remedy="check that it runs: tapes.join(), RegistryAggregator(…).start(), tapes run, or gunicorn -c "
        "python:tapes.contrib.gunicorn_conf start one"
        + (", and has the same TAPES_CURVE_KEY" if endpoints.key else ""),
    )
