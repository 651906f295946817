"""Every uWSGI worker answers for the whole service; one line in the application's module.

    import tapes.contrib.uwsgi

Workers join when they have been forked, or at once where uWSGI loads the application after the fork
(``lazy-apps``), and say goodbye when uWSGI ends them. The aggregator lives as long as uWSGI's master, through
reloads. Works with and without ``enable-threads``: where no Python thread runs, the end of every request
publishes. Nothing happens outside uWSGI.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import tapes
from tapes import forks, threads
from tapes.session import LocalSession

__all__: list[str] = []

_log = logging.getLogger("tapes.contrib.uwsgi")


def _join() -> None:
    try:
        tapes.join()
        if not threads.can_run():  # nothing else publishes before the first request
            tapes.default_registry.session.request_ended(may_be_the_last=True)
    except tapes.TapesError as error:
        _log.error("tapes: this worker can't join: %s", error)


def _leave() -> None:
    """Send the last values; other threads of this worker answer requests until the process has exited."""
    tapes.default_registry.session.leave()


def _after(before: Callable[[], Any] | None, ours: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        # uWSGI forks in C and runs no hook of Python: what ``before`` counts belongs to the child.
        forks.detect_fork()
        if before is not None:
            before()
        ours()

    return both


class _MasterSession(LocalSession):
    """The session of uWSGI's master: logs once that what it records after it has forked workers is lost.

    The master can't connect: a thread of tapes in it could hold a lock while uWSGI forks in C.
    """

    def __init__(self, uwsgi: Any) -> None:
        super().__init__(tapes.default_registry, tapes.default_registry.session.connect, looks=True)
        self.sleeps = True
        self._uwsgi = uwsgi

    def woken(self) -> bool:
        if self.sleeps and self._uwsgi.masterpid() == os.getpid():
            if not any(worker["pid"] for worker in self._uwsgi.workers()):
                return False  # values from before the fork count: every worker publishes them
            self.sleeps = False
            _log.warning(
                "tapes: what uWSGI's master records is not counted; start threads in the workers, by "
                "@uwsgidecorators.postfork or with --lazy-apps"
            )
        return True


def _install(uwsgi: Any) -> None:
    # The import takes the hook for itself, so it comes first. Without uWSGI's master it raises Exception.
    with contextlib.suppress(Exception):
        importlib.import_module("uwsgidecorators")
    uwsgi.atexit = _after(getattr(uwsgi, "atexit", None), _leave)
    if uwsgi.worker_id():
        _join()
    else:
        tapes.default_registry.use(_MasterSession(uwsgi))  # the master is no worker
        uwsgi.post_fork_hook = _after(getattr(uwsgi, "post_fork_hook", None), _join)


if "uwsgi" in sys.modules:
    _install(sys.modules["uwsgi"])
