"""What connects a registry to an aggregator, and disconnects it."""

from __future__ import annotations

from tapes import forks
from tapes.distributed.storage.locks import is_served
from tapes.distributed.supervision.rendezvous import Attachment, attach, ensure_aggregator
from tapes.distributed.worker.connected import ConnectedSession, close, connect, leave
from tapes.environment import may_start
from tapes.registry import Registry
from tapes.service import this_service

__all__ = ["close", "connect", "join", "lacks_aggregator", "leave"]


def join(registry: Registry, addr: str | None = None) -> None:
    """Connect ``registry`` to the aggregator of its service, and start one if none is there.

    Raises:
        AddressError, AggregatorUnavailable: If that can't be done.
        InvalidArgument: If ``registry`` is connected elsewhere.
    """
    if not may_start():
        connect(registry, addr)
        return
    connection = registry.connection
    if isinstance(connection, ConnectedSession) and connection.is_of_this_process:
        connect(registry, connection.endpoints.publish if addr is None else addr)  # or says what is wrong
        addr = connection.endpoints.publish
    connect(registry, ensure_aggregator(this_service(), addr).publish)


def lacks_aggregator(registry: Registry) -> bool:
    """Return whether ``registry`` is connected to where certainly no aggregator is."""
    connection = registry.connection
    if not isinstance(connection, ConnectedSession) or not may_start():
        return False
    endpoints = connection.endpoints
    answers = endpoints.path is None and attach(endpoints, forks.this_process()) is Attachment.ATTACHED
    return not (answers or is_served(endpoints))
