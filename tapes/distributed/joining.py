"""Joining a service: whose it is, where it meets, and who starts its aggregator.

The first comer starts it, under a lock, and everybody tells it whom to stay for. The aggregator takes the
same lock when it leaves, and then answers nobody: so nobody joins one that is about to go.
"""

from __future__ import annotations

import os

from tapes import forks
from tapes.distributed import directory
from tapes.distributed.address import DEFAULT_ADDR, Endpoints, is_served, resolve
from tapes.distributed.connection import AggregatorConnection, connect
from tapes.distributed.launch import launch
from tapes.distributed.questions import OlderAggregator, stay_for
from tapes.distributed.revival import replace
from tapes.environment import may_start
from tapes.errors import TapesError
from tapes.forks import Process
from tapes.registry import Registry
from tapes.service import Supervisor, supervisor

__all__ = ["Supervisor", "decide", "join", "lacks_aggregator", "meet"]


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
    if isinstance(connection, AggregatorConnection) and connection.is_of_this_process:
        connect(registry, connection.endpoints.publish if addr is None else addr)  # or says what is wrong
        addr = connection.endpoints.publish
    connect(registry, meet(supervisor(), addr).publish)


def meet(
    whom: Supervisor,
    addr: str | None = None,
    *,
    user: directory.User | None = None,
) -> Endpoints:
    """Have an aggregator that stays for ``whom`` and for this process, and return where it is.

    Sets ``TAPES_ADDR`` for the processes that this one will start.

    Args:
        whom: The service's supervisor.
        addr: Where to meet; by default ``TAPES_ADDR``, or a private directory of the service.
        user: Whom a new aggregator is to be run by; the user of this process if not given.

    Raises:
        AddressError, AggregatorUnavailable, InvalidArgument: If that can't be done.
    """
    user = directory.User.ourselves() if user is None else user
    while True:
        endpoints = directory.settle(decide(whom, addr), user)
        met = (forks.this_process(), endpoints)
        if met in _met and is_served(endpoints):
            break
        stays = _stays(endpoints, whom.process) if is_served(endpoints) or endpoints.path is None else None
        if stays is not True:
            with directory.start_lock(endpoints, user):  # waits for who starts it, or for it to leave
                if not is_served(endpoints) and directory.settle(endpoints, user) != endpoints:
                    continue  # it was started elsewhere meanwhile
                if stays is _IS_OLDER:
                    replace(endpoints)
                # Where there is no file to tell, asking does. One that is there and said nothing is held up.
                if not is_served(endpoints) and (endpoints.path is not None or stays is not _IS_OLDER):
                    _launch(endpoints, whom, user)
                    stays = None
                if stays is not False:
                    stays = _stays(endpoints, whom.process)
        if stays is True:
            _met.add(met)
        break
    os.environ["TAPES_ADDR"] = endpoints.publish
    return endpoints


def decide(whom: Supervisor, addr: str | None = None) -> Endpoints:
    """Return where a service is to meet, and hand that down to the processes that this one starts.

    Takes no time to speak of: nothing is made and nothing is started.

    Raises:
        AddressError, AggregatorUnavailable: If there can't be such a place.
    """
    if addr is None and not os.environ.get("TAPES_ADDR"):
        endpoints = directory.place_of(whom.process)
    else:
        endpoints = resolve(DEFAULT_ADDR if addr is None else addr)
    os.environ["TAPES_ADDR"] = endpoints.publish
    return endpoints


def _stays(endpoints: Endpoints, supervisor: Process) -> bool | str:
    """Ask the aggregator to stay for this process too; return whether it will, or `_IS_OLDER`."""
    try:
        return stay_for(endpoints, *{forks.this_process(), supervisor})
    except OlderAggregator:
        return _IS_OLDER


def _launch(endpoints: Endpoints, whom: Supervisor, user: directory.User) -> None:
    try:
        launch(endpoints, whom.process, whom.what, user)
    except TapesError:
        directory.clear(endpoints, files=False)
        raise


_IS_OLDER = "it is of an older release"
_met: set[tuple[Process, Endpoints]] = set()


def lacks_aggregator(registry: Registry) -> bool:
    """Return whether ``registry`` is connected to where certainly no aggregator is."""
    connection = registry.connection
    if not isinstance(connection, AggregatorConnection) or not may_start():
        return False
    endpoints = connection.endpoints
    answers = endpoints.path is None and _stays(endpoints, forks.this_process()) is True
    return not (answers or is_served(endpoints))
