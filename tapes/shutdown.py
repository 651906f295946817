"""The end of a process: what is done while it still can be.

One list for the ends of the interpreter and of a child of multiprocessing, which runs no ``atexit``, so that
things are done in their order: reports come before goodbyes.

Both come after the end of the process's threads, for which Python waits: before ``atexit`` in the
interpreter's own end, and after the finalizers in a child of multiprocessing. The latter has no hook, so the
function of `threading` that waits is wrapped.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import threading
from collections.abc import Callable
from enum import IntEnum
from operator import itemgetter

__all__ = ["Phase", "register", "unregister"]

_log = logging.getLogger("tapes")
_actions: dict[Callable[[], object], Phase] = {}


class Phase(IntEnum):
    """The order of actions.

    All reporters begin their last report before the process waits for any of them.
    """

    CONNECT = 0
    STOP_REPORTERS = 1
    LAST_REPORT = 2
    GOODBYE = 3


def register(action: Callable[[], object], phase: Phase) -> None:
    """Have ``action`` called when this process, or one that is forked from it, exits by itself."""
    _actions[action] = phase


def unregister(action: Callable[[], object]) -> None:
    """Have ``action`` not called any more."""
    _actions.pop(action, None)


def _end() -> None:
    interruption: BaseException | None = None
    while _actions:  # one of them may bring another
        action, _ = min(_actions.copy().items(), key=itemgetter(1))
        if _actions.pop(action, None) is None:  # another thread was faster
            continue
        try:
            action()
        except Exception:  # one of them must not keep the others from it
            _log.exception("tapes could not do what it does at the end of a process")
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _end_after_threads() -> None:
    """Have `_end` called in a child of multiprocessing, when all of its threads have ended."""
    waits: Callable[[], None] = threading._shutdown  # type: ignore[attr-defined]

    @functools.wraps(waits)
    def waits_and_ends() -> None:
        waits()
        if multiprocessing.parent_process() is not None:
            _end()

    threading._shutdown = waits_and_ends  # type: ignore[attr-defined]


atexit.register(_end)
_end_after_threads()
