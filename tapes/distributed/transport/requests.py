"""One question to the aggregator, and its answer."""

from __future__ import annotations

import contextlib
import os
import time

import zmq

from tapes.distributed.protocol.messages import WAIT, Attach, Flush, Goodbye, HandOver, Read, Reply
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.preflight import new_context
from tapes.distributed.transport.sockets import Socket, new_request_socket
from tapes.errors import AggregatorUnavailable, WireError
from tapes.processes import Process, host_id

__all__ = [
    "MAX_WAIT_SECONDS",
    "TIMEOUT_SECONDS",
    "OlderAggregator",
    "Question",
    "flush",
    "keep_alive_for",
    "request",
    "request_hand_over",
]

Question = Read | Attach | Goodbye | Flush | HandOver

TIMEOUT_SECONDS = 1.0
"""So long a read or a goodbye waits for the aggregator."""
MAX_WAIT_SECONDS = 10.0
"""Maximum seconds that a reader waits for an answer that is being made."""
_LOOK_MILLISECONDS = 100


class OlderAggregator(AggregatorUnavailable):
    """The aggregator speaks an older version of the wire and can't read what this process says."""


def request(endpoints: Endpoints, reader: Socket, question: Question, deadline: float) -> Reply:
    """Return the answer to ``question``.

    If another aggregator takes the place of the one that was asked, it is asked again: every question may be.
    While the aggregator makes a long answer, ``deadline`` is put off, to 10 s at most.

    Raises:
        AggregatorUnavailable: If there is no answer by ``deadline``.
        OlderAggregator: If it can't read the question.
        WireError: If the answer can't be read.
    """
    data = encode(question)
    latest = time.monotonic() + MAX_WAIT_SECONDS
    asked = incarnation(endpoints)
    _send(endpoints, reader, data, deadline)
    while True:
        left = max(0.0, deadline - time.monotonic())
        if reader.poll(min(_LOOK_MILLISECONDS, int(left * 1000) + 1), zmq.POLLIN):
            answer = _received(reader)
            if not isinstance(question, HandOver) and len(answer) > 1 and answer[1] < VERSION:
                raise OlderAggregator(
                    f"the aggregator at {endpoints.publish} is of an older version of tapes",
                    remedy="restart the process that started it",
                )
            reply = decode(answer)
            # A question that could not be read is answered with number 0.
            if isinstance(reply, Reply) and reply.correlation in (question.correlation, 0):
                if reply.status != WAIT:
                    return reply
                deadline = max(deadline, min(time.monotonic() + TIMEOUT_SECONDS, latest))
        elif not left:
            raise _unanswered(endpoints)
        elif asked != (asks := incarnation(endpoints)):
            asked = asks
            _send(endpoints, reader, data, deadline)


def _received(reader: Socket) -> memoryview | bytes:
    parts = [frame.buffer for frame in reader.recv_multipart(zmq.NOBLOCK, copy=False)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def keep_alive_for(endpoints: Endpoints, *clients: Process) -> bool:
    """Ask the aggregator to live as long as the processes ``clients``; return whether it said that it will.

    Raises:
        OlderAggregator: If it can't read that.
    """
    return _ask_once(endpoints, Attach(1, host_id(), clients))


def request_hand_over(endpoints: Endpoints) -> bool:
    """Ask an aggregator of an older version to make room; return whether it will."""
    return _ask_once(endpoints, HandOver(1, VERSION))


def flush(endpoints: Endpoints) -> bool:
    """Have the aggregator's reporters report now; return whether they did, within a second.

    It is no error if they did not: an aggregator of an earlier release can't be asked.
    """
    try:
        return _ask_once(endpoints, Flush(1))
    except OlderAggregator:
        return False


def _ask_once(endpoints: Endpoints, question: Question) -> bool:
    try:
        context = new_context()
    except AggregatorUnavailable:
        return False
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with contextlib.closing(new_request_socket(context, endpoints)) as reader:
            return request(endpoints, reader, question, deadline).status == "ok"
    except OlderAggregator:
        raise
    except (AggregatorUnavailable, WireError, zmq.ZMQError):
        return False
    finally:
        context.destroy(linger=0)


def _send(endpoints: Endpoints, reader: Socket, data: bytes, deadline: float) -> None:
    left = max(0.0, deadline - time.monotonic())
    if not reader.poll(int(left * 1000) + 1, zmq.POLLOUT):
        raise _unanswered(endpoints)
    reader.send(data, zmq.NOBLOCK)


def incarnation(endpoints: Endpoints) -> tuple[int, int] | None:
    """Return what tells the aggregator at an address from the one before it; ``None`` where nothing does."""
    try:
        found = os.stat(endpoints.lock or "")
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _unanswered(endpoints: Endpoints) -> AggregatorUnavailable:
    return AggregatorUnavailable(
        f"the aggregator at {endpoints.publish} did not answer within {TIMEOUT_SECONDS:g} s",
        remedy="see that it runs: tapes.join(), RegistryAggregator(…).start(), tapes run, or gunicorn -c "
        "python:tapes.contrib.gunicorn_conf start one"
        + (", and has the same TAPES_CURVE_KEY" if endpoints.key else ""),
    )
