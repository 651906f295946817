"""Connecting a registry to the aggregator of its service, which is started if there is none."""

from __future__ import annotations

import threading

from tapes import forks
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import is_served
from tapes.distributed.supervision.rendezvous import ensure_aggregator
from tapes.distributed.transport.address import resolve
from tapes.distributed.worker.connected import ConnectedSession, attach
from tapes.environment import is_disabled, may_start
from tapes.errors import InvalidArgument
from tapes.registry import Registry
from tapes.service import this_service


def connect(registry: Registry, addr: str | None) -> None:
    """Connect ``registry`` to the aggregator at ``addr``; do nothing if this process has done that already.

    Raises AddressError, or InvalidArgument if ``registry`` is connected elsewhere.
    """
    if is_disabled():
        return
    endpoints = runtime_directory.current_place(resolve(addr))
    forks.detect_fork()
    registry.session.is_pending = False  # a metric that a signal handler makes here does not connect
    with _connecting:
        session = registry.session
        if isinstance(session, ConnectedSession) and session.is_of_this_process:
            if not runtime_directory.is_same_service(session.endpoints, endpoints):
                raise InvalidArgument(
                    "connect()", got=endpoints.publish, expected=f"{session.endpoints.publish}, as before",
                    remedy="call close() first",
                )  # fmt: skip
        else:
            endpoints.check_key()
            session = attach(registry, endpoints)
        session.open()
    if session.endpoints != endpoints and is_served(endpoints):
        session.move(endpoints)


def join(registry: Registry, addr: str | None = None) -> None:
    """Connect ``registry`` to the aggregator of its service, and start one if there is none.

    Raises as `connect`, and AggregatorUnavailable.
    """
    if not may_start():
        connect(registry, addr)
        return
    session = registry.session.resolved()
    if isinstance(session, ConnectedSession) and session.is_of_this_process:
        connect(registry, session.endpoints.publish if addr is None else addr)  # raises if it is another one
        addr = session.endpoints.publish
    connect(registry, ensure_aggregator(this_service(), addr).publish)


def _renew_lock() -> None:
    global _connecting
    _connecting = threading.Lock()


_connecting = threading.Lock()
forks.renew_in_child(_renew_lock)
