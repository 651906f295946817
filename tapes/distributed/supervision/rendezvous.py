"""How a process finds the aggregator of its service, and starts it if there is none.

The first process that joins starts the aggregator, under the start lock. Each process then attaches: it asks
the aggregator to live as long as the process does. An aggregator that exits takes the same lock and answers
no request after that, so a process can't attach to an aggregator that is about to exit.
"""

from __future__ import annotations

import enum
import os

from tapes import forks
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import is_served
from tapes.distributed.storage.runtime_directory import User
from tapes.distributed.storage.start_lock import start_lock
from tapes.distributed.supervision.launch import launch
from tapes.distributed.supervision.restart import replace
from tapes.distributed.transport.address import DEFAULT_ADDR, Endpoints, resolve
from tapes.distributed.transport.requests import OlderAggregator, keep_alive_for
from tapes.errors import TapesError
from tapes.processes import Process
from tapes.service import Service


class Attachment(enum.Enum):
    """The result of `attach`."""

    ATTACHED = "the aggregator lives as long as this process"
    UNANSWERED = "the aggregator refused, or there was no reply in time"
    OLDER = "the aggregator is of an older release and can't read the request"
    ABSENT = "no aggregator holds the lock"


def ensure_aggregator(service: Service, addr: str | None = None, *, user: User | None = None) -> Endpoints:
    """Have an aggregator that lives as long as ``service`` and this process; return its endpoints.

    Sets ``TAPES_ADDR`` for the processes that this one starts. A new aggregator runs as ``user``, by default
    that of this process. Raises AddressError, AggregatorUnavailable or InvalidArgument if there is no
    aggregator and none can be started.
    """
    user = User.ourselves() if user is None else user
    while True:
        # 1. Choose the place. Nothing is left to do if this process is attached there.
        endpoints = runtime_directory.choose_place(choose_address(service, addr), user)
        key = (forks.this_process(), endpoints)
        if key in _attached and is_served(endpoints):
            break
        # 2. Attach to the aggregator there.
        result = attach(endpoints, service.root)
        if result is not Attachment.ATTACHED:
            # 3. Wait until no other process starts an aggregator there, and none is exiting.
            with start_lock(endpoints, user):
                if not is_served(endpoints) and runtime_directory.choose_place(endpoints, user) != endpoints:
                    continue  # another process has started it in another place meanwhile
                # 4. Start an aggregator, and attach to it.
                result = _start_and_attach(endpoints, service, user, result)
        if result is Attachment.ATTACHED:
            _attached.add(key)
        break
    os.environ["TAPES_ADDR"] = endpoints.publish
    return endpoints


def choose_address(service: Service, addr: str | None = None) -> Endpoints:
    """Return the endpoints of a service, and hand them down to the processes that this one starts.

    The default of ``addr`` is ``TAPES_ADDR``, or a private directory of the service. It is fast: it creates
    no file and starts no process. Raises as `ensure_aggregator`.
    """
    if addr is None and not os.environ.get("TAPES_ADDR"):
        endpoints = runtime_directory.place_of(service.root)
    else:
        endpoints = resolve(DEFAULT_ADDR if addr is None else addr)
    os.environ["TAPES_ADDR"] = endpoints.publish
    return endpoints


def attach(endpoints: Endpoints, root: Process) -> Attachment:
    """Ask the aggregator to live as long as this process and ``root``."""
    if endpoints.path is not None and not is_served(endpoints):
        return Attachment.ABSENT
    try:
        is_attached = keep_alive_for(endpoints, *{forks.this_process(), root})
    except OlderAggregator:
        return Attachment.OLDER
    return Attachment.ATTACHED if is_attached else Attachment.UNANSWERED


def _start_and_attach(endpoints: Endpoints, service: Service, user: User, before: Attachment) -> Attachment:
    """Start or replace the aggregator if necessary, and attach; ``before`` is the last result of that."""
    # 1. Have an aggregator of an older release exit.
    if before is Attachment.OLDER:
        replace(endpoints)
    # 2. Start one if there is none. TCP has no lock file; there an older release can't be replaced.
    is_absent = before is not Attachment.OLDER if endpoints.path is None else not is_served(endpoints)
    if is_absent:
        try:
            launch(endpoints, service.root, service.description, user)
        except TapesError:
            runtime_directory.clear(endpoints, files=False)
            raise
    # 3. Attach, but not again to an aggregator that lives and does not answer.
    return attach(endpoints, service.root) if is_absent or before is not Attachment.UNANSWERED else before


_attached: set[tuple[Process, Endpoints]] = set()
