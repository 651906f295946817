"""The four 0MQ sockets: which options each one has, and why.

    worker:  XPUB   ──► SUB     :aggregator:   updates that workers publish
             DEALER ──► ROUTER                 requests, goodbyes among them

* IMMEDIATE: without it a connecting XPUB notices neither the death nor the return of its subscriber. And
  requests wait in the worker.
* XPUB_NODROP and a short queue: otherwise a full queue drops the newest message without an error.
* XPUB_VERBOSE: a second subscription is seen while the first one lingers.
* HEARTBEAT: after a failed send libzmq sends nothing until there is something new to send.

The aggregator subscribes to everything, and to a topic that names its version of the wire: so a worker
notices an aggregator of an older release. For TCP with a key see `tapes.distributed.transport.curve`.
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

Socket = zmq.Socket[bytes]

_QUEUE = 4
_HEARTBEAT_MILLISECONDS = 1000
_ANNOUNCEMENT = re.compile(rb"\xfftapes wire (\d{1,6})")


def bind(context: zmq.Context[Any], endpoints: Endpoints) -> tuple[Socket, Socket]:
    """Return the aggregator's sockets for publications and for requests; other users can't connect.

    Raises AddressInUse, AddressError, or AggregatorUnavailable if no thread can start that checks keys.
    """
    pair = endpoints.key.pair if endpoints.key else None
    if pair:
        curve.start_zap_handler(context, pair)
    updates, requests = context.socket(zmq.SUB), context.socket(zmq.ROUTER)
    updates.setsockopt(zmq.SUBSCRIBE, b"")
    updates.setsockopt(zmq.SUBSCRIBE, b"\xfftapes wire %d" % VERSION)
    umask = os.umask(0o077)
    try:
        for endpoint, bound in ((endpoints.publish, updates), (endpoints.read, requests)):
            bound.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
            bound.setsockopt(zmq.LINGER, 0)
            bound.setsockopt(zmq.IPV6, int("[" in endpoint))
            if pair:
                curve.as_server(bound, pair)
            try:
                bound.bind(endpoint)
            except zmq.ZMQError as error:
                updates.close()
                requests.close()
                kind = AddressInUse if error.errno == zmq.EADDRINUSE else AddressError
                raise kind(
                    f"the aggregator can't bind {endpoint} ({error.strerror})",
                    remedy="choose another address, or stop the process that listens there",
                ) from None
    finally:
        os.umask(umask)
    return updates, requests


def bind_again(updates: Socket, requests: Socket, before: Endpoints, endpoints: Endpoints) -> None:
    """Bind the aggregator's sockets at ``endpoints``, as their files were removed; connections stay open."""
    umask = os.umask(0o077)
    try:
        for bound, former, endpoint in (
            (updates, before.publish, endpoints.publish), (requests, before.read, endpoints.read)
        ):  # fmt: skip
            with contextlib.suppress(zmq.ZMQError):
                bound.unbind(former)
            bound.bind(endpoint)
    except zmq.ZMQError as error:
        what = f"the aggregator can't bind {endpoint} ({error.strerror})"
        raise AddressError(what, remedy="choose another address") from None
    finally:
        os.umask(umask)


def new_publisher(context: zmq.Context[Any], endpoints: Endpoints) -> Socket:
    """Return a worker's socket for its updates; raises as `new_request_socket`."""
    options = {
        zmq.XPUB_NODROP: 1, zmq.XPUB_VERBOSE: 1, zmq.SNDHWM: _QUEUE,
        zmq.HEARTBEAT_IVL: _HEARTBEAT_MILLISECONDS, zmq.HEARTBEAT_TIMEOUT: 30 * _HEARTBEAT_MILLISECONDS,
    }  # fmt: skip
    return _connected(context, zmq.XPUB, options, endpoints, endpoints.publish)


def new_request_socket(context: zmq.Context[Any], endpoints: Endpoints) -> Socket:
    """Return a worker's socket for requests; raises AddressError or AggregatorUnavailable."""
    return _connected(context, zmq.DEALER, {zmq.MAXMSGSIZE: MAX_BYTES}, endpoints, endpoints.read)


def _connected(
    context: zmq.Context[Any], kind: int, options: dict[Any, int], endpoints: Endpoints, endpoint: str
) -> Socket:
    check_descriptors()
    connecting: Socket = context.socket(kind)
    options |= {zmq.IMMEDIATE: 1, zmq.LINGER: 0, zmq.IPV6: int("[" in endpoint)}
    for option, value in options.items():
        connecting.setsockopt(option, value)
    if endpoints.key:
        curve.as_client(connecting, endpoints.key.pair)
    try:
        connecting.connect(endpoint)
    except zmq.ZMQError as error:
        what = f"can't connect to {endpoint} ({error.strerror})"
        raise AddressError(what, remedy="use another address") from None
    return connecting


def announced_version(topic: bytes) -> int | None:
    """Return the version of the wire that ``topic`` announces; ``None`` for another topic."""
    match = _ANNOUNCEMENT.fullmatch(topic)
    return int(match[1]) if match else None
