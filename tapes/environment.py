"""What the environment variables of tapes configure, and a warning where two of them have no effect.

Nothing here needs a package that has to be installed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from typing import Any

from tapes import forks, processes, service, threads
from tapes.errors import InvalidArgument

LABELS = "TAPES_LABELS"
_CONNECTED = "TAPES_CONNECTED"  # of the process that started this one: its pid, and where it is connected
_REPORTERS = ("TAPES_HTTP", "TAPES_STATSD")
_JOIN_SECONDS = 5.0  # seconds from the import of tapes after which a process counts as one that never joins

_log = logging.getLogger("tapes")
_warnings: list[_UnusedWarning] = []  # keeps it alive, as fork hooks are found by weak references


def is_disabled() -> bool:
    """Return whether tapes is turned off (``TAPES_DISABLED=1``): nothing is started or connected."""
    return os.environ.get("TAPES_DISABLED", "0") not in ("", "0")


def may_start() -> bool:
    """Return whether processes may start an aggregator when they join (unless ``TAPES_AUTOSTART=0``)."""
    return os.environ.get("TAPES_AUTOSTART", "1") != "0"


def configured_labels() -> dict[str, str]:
    """Return the labels that the default registry gives to every series: ``TAPES_LABELS=key=value,…``.

    Raises:
        InvalidArgument: If the variable has another form.
    """
    text = os.environ.get(LABELS, "")
    labels: dict[str, str] = {}
    for pair in text.split(",") if text else ():
        name, _, value = map(str.strip, pair.partition("="))
        if not (name and value) or name in labels:
            expected = "KEY=VALUE,KEY=VALUE, each key once, such as region=eu,service=shop"
            raise InvalidArgument(LABELS, got=text, expected=expected)
        labels[name] = value
    return labels


def configured_address() -> str:
    """Return the address to which the default registry connects without a call; empty if there is none.

    It is ``TAPES_ADDR``, or the address to which the process that started this one is connected.
    """
    if is_disabled():
        return ""
    return os.environ.get("TAPES_ADDR") or next(iter(connected_parent()), "")


def connected_parent() -> list[str]:
    """Return the addresses to which the process that started this one has connected its registries.

    The address of its default registry comes first; empty if that was not connected.
    """
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    inherited = getattr(multiprocessing and multiprocessing.current_process(), "_config", {})
    pid, *addresses = (inherited.get(_CONNECTED) or os.environ.get(_CONNECTED, "")).split("\n")
    return [] if pid == str(os.getpid()) else addresses


def hand_down(addresses: list[str]) -> None:
    """Hand the addresses of the registries of this process down to the processes that it will start.

    They travel in the environment, and to children of multiprocessing in what these inherit from their
    parent: the fork server that makes them may have been started earlier, with an older environment.
    """
    text = "\n".join([str(os.getpid()), *addresses]) if addresses else ""
    if text:
        os.environ[_CONNECTED] = text
    else:
        os.environ.pop(_CONNECTED, None)
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    getattr(multiprocessing and multiprocessing.current_process(), "_config", {})[_CONNECTED] = text


def service_address() -> str:
    """Return `configured_address`, or the address of this service's aggregator; empty if there is none."""
    return "" if is_disabled() else configured_address() or service.address()


def is_spawned() -> bool:
    """Return whether multiprocessing made this process, or is about to import its main module."""
    process = multiprocessing.current_process()
    return multiprocessing.parent_process() is not None or getattr(process, "_inheriting", False)


def warn_if_unused(registry: Any) -> None:
    """Log once if the environment configures reporters and ``registry`` has joined no service after 5 s.

    ``TAPES_HTTP`` and ``TAPES_STATSD`` configure the aggregator of a service. Where no process joins one,
    nothing listens or reports.
    """
    names = [name for name in _REPORTERS if os.environ.get(name)]
    if names and not is_disabled():
        _warnings.append(_UnusedWarning(registry, names))
        forks.register_user(_warnings[0])


class _UnusedWarning:
    """Checks once whether ``registry`` has joined a service; a forked child does not check again."""

    def __init__(self, registry: Any, names: list[str]) -> None:
        self._registry, self._names = registry, names
        self._delayed = threads.Delayed(self._check, _JOIN_SECONDS, "tapes-unused")
        if threads.can_run():
            self._delayed.start()

    def before_fork(self) -> None:
        self._delayed.pause()

    def after_in_parent(self) -> None:
        self._delayed.resume()

    def after_in_child(self, parent: processes.Process, version: int) -> None:
        self._delayed = threads.Delayed(self._check, _JOIN_SECONDS, "tapes-unused")

    def after_in_helper(self) -> None:
        pass

    def _check(self) -> None:
        try:
            if not self._registry.session.is_connected and not service_address():
                _log.warning("%s", self._text())
        except Exception as error:  # looking at the file system can fail
            _log.debug("tapes can't find out whether this process joined a service: %s", error)

    def _text(self) -> str:
        have = "has" if len(self._names) == 1 else "have"
        why = (
            "this process has joined no service" if may_start() else "TAPES_AUTOSTART=0 starts no aggregator"
        )
        return (
            f"{' and '.join(self._names)} {have} no effect: {why}, so there is no aggregator; "
            "call tapes.join(), or start this program by: tapes run -- COMMAND"
        )
