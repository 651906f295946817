"""The last updates of registries, from their goodbye until an aggregator acknowledges it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

from tapes.distributed.protocol.messages import Goodbye, Reply, Update
from tapes.distributed.storage import spool
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AggregatorUnavailable
from tapes.registry import Registry

_pending: weakref.WeakKeyDictionary[Registry, list[Update]] = weakref.WeakKeyDictionary()


class Goodbyes:
    """The last updates of ``registry`` that no aggregator has acknowledged, whichever session sent them."""

    def __init__(self, registry: Registry) -> None:
        self._updates = _pending.setdefault(registry, [])

    def __bool__(self) -> bool:
        return bool(self._updates)

    def add(self, update: Update) -> None:
        """Have ``update`` sent, or spooled."""
        self._updates.append(update)

    def replace(self, update: Update, other: Update) -> None:
        """Have ``other`` sent in the place of ``update``."""
        self._updates[:] = [other if one is update else one for one in self._updates]

    def send(self, endpoints: Endpoints, send: Callable[[Update], Reply]) -> None:
        """Send all of them.

        Raises:
            AggregatorUnavailable: If one of them is not acknowledged.
        """
        while self._updates:
            update = self._updates[0]
            if send(update).status != "ok":
                raise AggregatorUnavailable("the aggregator refused a goodbye")
            spool.discard(endpoints, Goodbye(0, update))
            with contextlib.suppress(ValueError):  # another reader may have sent it too, which is harmless
                self._updates.remove(update)

    def spool(self, endpoints: Endpoints) -> None:
        """Write them beside the socket, for the aggregator to read when it can."""
        spool.write_all(endpoints, [Goodbye(0, update) for update in self._updates])
