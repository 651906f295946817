"""The four 0MQ sockets: what is set on each, and why.

    worker:  XPUB   ──► SUB     :aggregator:   what workers publish
             DEALER ──► ROUTER                 questions and goodbyes

IMMEDIATE, as otherwise an XPUB that connects notices neither the death nor the return of its subscriber, and
so that a question waits in the worker; XPUB_NODROP and a short queue, as otherwise a full queue drops the
newest message without a word; XPUB_VERBOSE, so that a second subscription is seen while the first lingers;
HEARTBEAT, as libzmq, when a send has failed, sends nothing more until there is something new to be sent.

The aggregator subscribes to everything, and to a topic of its own that says which version of the wire it
speaks: that is how a worker learns of an older one.

Where the service has a key, TCP uses it at both ends: see `tapes.distributed.transport.curve`.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

import zmq

from tapes.distributed.protocol.wire import MAX_BYTES, VERSION
from tapes.distributed.transport import curve
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.preflight import check_descriptors
from tapes.errors import AddressError, AddressInUse

__all__ = ["Socket", "announced_version", "bind", "bind_again", "new_publisher", "new_request_socket"]

Socket = zmq.Socket[bytes]

_QUEUE = 4
_HEARTBEAT_MILLISECONDS = 1000
_ANNOUNCEMENT = re.compile(rb"\xfftapes wire (\d{1,6})")


def bind(context: zmq.Context[Any], endpoints: Endpoints) -> tuple[Socket, Socket]:
    """Return the aggregator's sockets for publications and for questions, closed to other users.

    Raises:
        AddressInUse, AddressError: If an address can't be bound, or its key can't be used.
        AggregatorUnavailable: If nobody could be there to check keys.
    """
    pair = endpoints.key.pair() if endpoints.key else None
    if pair:
        curve.start_zap_handler(context, pair)
    updates, questions = context.socket(zmq.SUB), context.socket(zmq.ROUTER)
    updates.setsockopt(zmq.SUBSCRIBE, b"")
    updates.setsockopt(zmq.SUBSCRIBE, b"\xfftapes wire %d" % VERSION)
    umask = os.umask(0o077)
    try:
        for endpoint, bound in ((endpoints.publish, updates), (endpoints.read, questions)):
            bound.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
            bound.setsockopt(zmq.LINGER, 0)
            bound.setsockopt(zmq.IPV6, int("[" in endpoint))
            if pair:
                curve.as_server(bound, pair)
            try:
                bound.bind(endpoint)
            except zmq.ZMQError as error:
                updates.close()
                questions.close()
                kind = AddressInUse if error.errno == zmq.EADDRINUSE else AddressError
                raise kind(
                    f"the aggregator can't bind {endpoint} ({error.strerror})",
                    remedy="choose another address, or stop what listens there",
                ) from None
    finally:
        os.umask(umask)
    return updates, questions


def bind_again(updates: Socket, questions: Socket, before: Endpoints, endpoints: Endpoints) -> None:
    """Have the aggregator's sockets, whose files were removed, listen at ``endpoints``; connections stay.

    Raises:
        AddressError: If that can't be done.
    """
    umask = os.umask(0o077)
    try:
        for bound, was, endpoint in (
            (updates, before.publish, endpoints.publish), (questions, before.read, endpoints.read)
        ):  # fmt: skip
            with contextlib.suppress(zmq.ZMQError):
                bound.unbind(was)
            bound.bind(endpoint)
    except zmq.ZMQError as error:
        raise AddressError(
            f"the aggregator can't bind {endpoint} ({error.strerror})", remedy="choose another address"
        ) from None
    finally:
        os.umask(umask)


def new_publisher(context: zmq.Context[Any], endpoints: Endpoints) -> Socket:
    """Return a worker's socket for what it publishes; raises as `new_request_socket`."""
    check_descriptors()
    publisher: Socket = context.socket(zmq.XPUB)
    for option, value in (
        (zmq.IMMEDIATE, 1), (zmq.XPUB_NODROP, 1), (zmq.XPUB_VERBOSE, 1),
        (zmq.SNDHWM, _QUEUE), (zmq.LINGER, 0),
        (zmq.HEARTBEAT_IVL, _HEARTBEAT_MILLISECONDS), (zmq.HEARTBEAT_TIMEOUT, 30 * _HEARTBEAT_MILLISECONDS),
    ):  # fmt: skip
        publisher.setsockopt(option, value)
    _connect(publisher, endpoints, endpoints.publish)
    return publisher


def new_request_socket(context: zmq.Context[Any], endpoints: Endpoints) -> Socket:
    """Return a worker's socket for questions and goodbyes.

    Raises:
        AddressError: If the address can't be used.
        AggregatorUnavailable: If there are no file descriptors left.
    """
    check_descriptors()
    reader: Socket = context.socket(zmq.DEALER)
    for option, value in ((zmq.IMMEDIATE, 1), (zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_BYTES)):
        reader.setsockopt(option, value)
    _connect(reader, endpoints, endpoints.read)
    return reader


def _connect(connecting: Socket, endpoints: Endpoints, endpoint: str) -> None:
    connecting.setsockopt(zmq.IPV6, int("[" in endpoint))
    if endpoints.key:
        curve.as_client(connecting, endpoints.key.pair())
    try:
        connecting.connect(endpoint)
    except zmq.ZMQError as error:
        raise AddressError(
            f"nothing can connect to {endpoint} ({error.strerror})", remedy="give another address"
        ) from None


def announced_version(topic: bytes) -> int | None:
    """Return which version of the wire an aggregator announces by subscribing to ``topic``, if it does."""
    match = _ANNOUNCEMENT.fullmatch(topic)
    return int(match[1]) if match else None
