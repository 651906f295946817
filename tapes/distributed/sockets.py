"""The four 0MQ sockets: what is set on each, and why.

    worker:  XPUB   ──► SUB     :aggregator:   what workers publish
             DEALER ──► ROUTER                 questions and goodbyes

IMMEDIATE, as otherwise an XPUB that connects notices neither the death nor the return of its subscriber, and
so that a question waits in the worker; XPUB_NODROP and a short queue, as otherwise a full queue drops the
newest message without a word; XPUB_VERBOSE, so that a second subscription is seen while the first lingers.

The aggregator subscribes to everything, and to a topic of its own that says which version of the wire it
speaks: that is how a worker learns of an older one.
"""

from __future__ import annotations

import os
import re
from typing import Any

import zmq

from tapes.distributed.address import Endpoints
from tapes.distributed.wire import MAX_BYTES, VERSION
from tapes.errors import AddressError, AddressInUse

__all__ = ["announced_version", "bind", "new_publisher", "new_reader"]

Socket = zmq.Socket[bytes]

_QUEUE = 4
_ANNOUNCEMENT = re.compile(rb"\xfftapes wire (\d{1,6})")


def bind(context: zmq.Context[Any], endpoints: Endpoints) -> tuple[Socket, Socket]:
    """Return the aggregator's sockets for publications and for questions, closed to other users.

    Raises:
        AddressInUse, AddressError: If an address can't be bound.
    """
    updates, questions = context.socket(zmq.SUB), context.socket(zmq.ROUTER)
    updates.setsockopt(zmq.SUBSCRIBE, b"")
    updates.setsockopt(zmq.SUBSCRIBE, b"\xfftapes wire %d" % VERSION)
    umask = os.umask(0o077)
    try:
        for endpoint, bound in ((endpoints.publish, updates), (endpoints.read, questions)):
            bound.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
            bound.setsockopt(zmq.LINGER, 0)
            bound.setsockopt(zmq.IPV6, int("[" in endpoint))
            try:
                bound.bind(endpoint)
            except zmq.ZMQError as error:
                kind = AddressInUse if error.errno == zmq.EADDRINUSE else AddressError
                raise kind(
                    f"the aggregator can't bind {endpoint} ({error.strerror})",
                    remedy="choose another address, or stop what listens there",
                ) from None
    finally:
        os.umask(umask)
    return updates, questions


def new_publisher(context: zmq.Context[Any], endpoints: Endpoints) -> Socket:
    """Return a worker's socket for what it publishes."""
    publisher: Socket = context.socket(zmq.XPUB)
    for option, value in (
        (zmq.IMMEDIATE, 1), (zmq.XPUB_NODROP, 1), (zmq.XPUB_VERBOSE, 1),
        (zmq.SNDHWM, _QUEUE), (zmq.LINGER, 0),
    ):  # fmt: skip
        publisher.setsockopt(option, value)
    _connect(publisher, endpoints.publish)
    return publisher


def new_reader(context: zmq.Context[Any], endpoints: Endpoints) -> Socket:
    """Return a worker's socket for questions and goodbyes."""
    reader: Socket = context.socket(zmq.DEALER)
    for option, value in ((zmq.IMMEDIATE, 1), (zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_BYTES)):
        reader.setsockopt(option, value)
    _connect(reader, endpoints.read)
    return reader


def _connect(connecting: Socket, endpoint: str) -> None:
    connecting.setsockopt(zmq.IPV6, int("[" in endpoint))
    connecting.connect(endpoint)


def announced_version(topic: bytes) -> int | None:
    """Return which version of the wire an aggregator announces by subscribing to ``topic``, if it does."""
    match = _ANNOUNCEMENT.fullmatch(topic)
    return int(match[1]) if match else None
