"""A warning that reporters of the environment have no effect in a process that joins no service.

``TAPES_HTTP`` and ``TAPES_STATSD`` configure the aggregator of a service. Where no process joins one, there
is no aggregator, and nothing listens or reports. Only time shows that, as a process may join at any moment.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from tapes import forks, processes, threads
from tapes.environment import is_disabled, may_start, service_address

__all__ = ["watch"]

_SECONDS = 5.0
"""Seconds from the import of tapes until a process counts as one that does not join."""
_REPORTERS = ("TAPES_HTTP", "TAPES_STATSD")

_log = logging.getLogger("tapes")


class _Watch:
    """Looks once whether ``registry`` has joined; a forked child does not look again."""

    def __init__(self, registry: Any, names: list[str]) -> None:
        self._registry = registry
        self._names = names
        self._delayed = threads.Delayed(self._look, _SECONDS, "tapes-alone")
        if threads.can_run():
            self._delayed.start()

    def before_fork(self) -> None:
        self._delayed.pause()

    def after_in_parent(self) -> None:
        self._delayed.resume()

    def after_in_child(self, parent: processes.Process, version: int) -> None:
        self._delayed = threads.Delayed(self._look, _SECONDS, "tapes-alone")

    def after_in_helper(self) -> None:
        pass

    def _look(self) -> None:
        try:
            if self._registry._connection is None and not service_address():
                _log.warning("%s", self._text())
        except Exception as error:  # looking at the file system can fail
            _log.debug("tapes can't find out whether this process joined a service: %s", error)

    def _text(self) -> str:
        are = "has" if len(self._names) == 1 else "have"
        why = (
            "this process has joined no service" if may_start() else "TAPES_AUTOSTART=0 starts no aggregator"
        )
        return (
            f"{' and '.join(self._names)} {are} no effect: {why}, so there is no aggregator; "
            "call tapes.join(), or start this program by: tapes run -- COMMAND"
        )


_watches: list[_Watch] = []


def watch(registry: Any) -> None:
    """Log once, after some seconds, if ``registry`` has not joined and the environment names reporters."""
    names = [name for name in _REPORTERS if os.environ.get(name)]
    if names and not is_disabled():
        _watches.append(_Watch(registry, names))
        forks.register_user(_watches[0])
