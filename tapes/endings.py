"""The end of a process: what is done while it still can be.

One list for the ends of the interpreter and of a child of multiprocessing, which runs no ``atexit``, so that
things are done in their order: reports come before goodbyes.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.util
from operator import itemgetter
from typing import Callable

__all__ = ["GOODBYE", "LAST_REPORT", "NO_MORE_REPORTS", "at_end", "forget"]

NO_MORE_REPORTS, LAST_REPORT, GOODBYE = range(3)
"""The order of what is done: all reporters are told, so that waiting for them is done for all at once."""

_log = logging.getLogger("tapes")
_actions: dict[Callable[[], object], int] = {}


def at_end(action: Callable[[], object], order: int) -> None:
    """Have ``action`` called when this process, or one that is forked from it, ends by itself."""
    _actions[action] = order


def forget(action: Callable[[], object]) -> None:
    """Have it not called any more."""
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


def _in_child(_: object = None) -> None:
    multiprocessing.util.Finalize(None, _end, exitpriority=100)


atexit.register(_end)
# In a child of multiprocessing finalizers are cleared after the fork's hooks, and before these.
multiprocessing.util.register_after_fork(_end, _in_child)
if multiprocessing.parent_process() is not None:
    _in_child()
