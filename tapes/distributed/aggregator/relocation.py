"""What becomes of an aggregator whose files have gone, as when a login session ends with its directory.

Its connected workers still reach it, and no other process does. So it makes its files again, in the same
place or, if its directory is a private one, in another place where its service looks. If another aggregator
serves one of these places by then, this one hands everything over to that and leaves: the states of the
living, which they will supersede, and the total of those that left, which is entered like the last update of
one more worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import zmq

from tapes.distributed.protocol.messages import Attach, Goodbye, Read
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.requests import request_all
from tapes.errors import TapesError

__all__ = ["Inheritance", "hand_over"]

Inheritance = Iterable[Attach | Read | Goodbye]

_log = logging.getLogger("tapes.distributed")


def hand_over(inheritance: Inheritance, heir: Endpoints) -> bool:
    """Give ``inheritance`` to the aggregator at ``heir``; return whether that has all of it.

    It may be given again: nothing of it counts twice.
    """
    try:
        return request_all(heir, inheritance)
    except (TapesError, zmq.ZMQError) as error:
        _log.warning("tapes can't hand over to the aggregator at %s yet: %s", heir.publish, error)
        return False
