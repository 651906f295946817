"""What tapes does when a process exits, in the order of `Phase`.

One list serves the exit of the interpreter and that of a child of multiprocessing, which runs no ``atexit``.
Both run the list after the process's threads have ended. Python waits for these before ``atexit``, and after
the finalizers in a child of multiprocessing. The child has no hook at that point, so the function of
`threading` that waits is wrapped.
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

_log = logging.getLogger("tapes")
_actions: dict[Callable[[], object], Phase] = {}


class Phase(IntEnum):
    """The order: all reporters begin their last report before the process waits for any of them."""

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
    while _actions:  # an action may register another one
        action, _ = min(_actions.copy().items(), key=itemgetter(1))
        if _actions.pop(action, None) is None:  # another thread was faster
            continue
        try:
            action()
        except Exception:  # the others run all the same
            _log.exception("tapes: an action at the exit of the process failed")
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _end_after_threads() -> None:
    """Have `_end` called in a child of multiprocessing when all of its threads have ended."""
    waits: Callable[[], None] = threading._shutdown  # type: ignore[attr-defined]

    @functools.wraps(waits)
    def waits_and_ends() -> None:
        waits()
        if multiprocessing.parent_process() is not None:
            _end()

    threading._shutdown = waits_and_ends  # type: ignore[attr-defined]


atexit.register(_end)
_end_after_threads()
