"""Handing over to another aggregator, as the files of this one were removed; see `.residence`.

The other one gets the states of live workers, which the workers will replace, and the total of exited ones,
which it enters like the last update of one more worker.
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
    """Send ``inheritance`` to the aggregator at ``heir``; return whether it has all of it.

    It may be sent again: nothing of it counts twice.
    """
    try:
        return request_all(heir, inheritance)
    except (TapesError, zmq.ZMQError) as error:
        _log.warning("tapes can't hand over to the aggregator at %s yet: %s", heir.publish, error)
        return False
