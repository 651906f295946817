"""Joining a service: whose it is, where it meets, and who starts its aggregator.

The first comer starts it, under a lock, and everybody tells it whom to stay for. The aggregator takes the
same lock when it leaves, and then answers nobody: so nobody joins one that is about to go.
"""

from __future__ import annotations

import os

from tapes import forks
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import is_served
from tapes.distributed.supervision.launch import launch
from tapes.distributed.supervision.restart import replace
from tapes.distributed.transport.address import DEFAULT_ADDR, Endpoints, resolve
from tapes.distributed.transport.requests import OlderAggregator, keep_alive_for
from tapes.errors import TapesError
from tapes.processes import Process
from tapes.service import Service

__all__ = ["Service", "attach", "choose_address", "ensure_aggregator"]


def ensure_aggregator(
    service: Service,
    addr: str | None = None,
    *,
    user: runtime_directory.User | None = None,
) -> Endpoints:
    """Have an aggregator that stays for ``service`` and for this process, and return where it is.

    Sets ``TAPES_ADDR`` for the processes that this one will start.

    Args:
        service: The service.
        addr: Where to meet; by default ``TAPES_ADDR``, or a private directory of the service.
        user: Whom a new aggregator is to be run by; the user of this process if not given.

    Raises:
        AddressError, AggregatorUnavailable, InvalidArgument: If that can't be done.
    """
    user = runtime_directory.User.ourselves() if user is None else user
    while True:
        endpoints = runtime_directory.choose_place(choose_address(service, addr), user)
        met = (forks.this_process(), endpoints)
        if met in _met and is_served(endpoints):
            break
        stays = attach(endpoints, service.root) if is_served(endpoints) or endpoints.path is None else None
        if stays is not True:
            with runtime_directory.start_lock(endpoints, user):  # waits for who starts it, or for it to leave
                if not is_served(endpoints) and runtime_directory.choose_place(endpoints, user) != endpoints:
                    continue  # it was started elsewhere meanwhile
                if stays is _IS_OLDER:
                    replace(endpoints)
                # Where there is no file to tell, asking does. One that is there and said nothing is held up.
                if not is_served(endpoints) and (endpoints.path is not None or stays is not _IS_OLDER):
                    _launch(endpoints, service, user)
                    stays = None
                if stays is not False:
                    stays = attach(endpoints, service.root)
        if stays is True:
            _met.add(met)
        break
    os.environ["TAPES_ADDR"] = endpoints.publish
    return endpoints


def choose_address(service: Service, addr: str | None = None) -> Endpoints:
    """Return where a service is to meet, and hand that down to the processes that this one starts.

    Takes no time to speak of: nothing is made and nothing is started.

    Raises:
        AddressError, AggregatorUnavailable: If there can't be such a place.
    """
    if addr is None and not os.environ.get("TAPES_ADDR"):
        endpoints = runtime_directory.place_of(service.root)
    else:
        endpoints = resolve(DEFAULT_ADDR if addr is None else addr)
    os.environ["TAPES_ADDR"] = endpoints.publish
    return endpoints


def attach(endpoints: Endpoints, supervisor: Process) -> bool | str:
    """Ask the aggregator to stay for this process too; return whether it will, or `_IS_OLDER`."""
    try:
        return keep_alive_for(endpoints, *{forks.this_process(), supervisor})
    except OlderAggregator:
        return _IS_OLDER


def _launch(endpoints: Endpoints, service: Service, user: runtime_directory.User) -> None:
    try:
        launch(endpoints, service.root, service.description, user)
    except TapesError:
        runtime_directory.clear(endpoints, files=False)
        raise


_IS_OLDER = "it is of an older release"
_met: set[tuple[Process, Endpoints]] = set()
