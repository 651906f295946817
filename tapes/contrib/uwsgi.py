"""Every uWSGI worker answers for the whole service; one line in the application's module.

    import tapes.contrib.uwsgi

Workers join when uWSGI has forked them, or at once where it loads the application after the fork
(``lazy-apps``). They flush when uWSGI ends them. The aggregator lives as long as uWSGI's master, through
reloads. All of this works with and without ``enable-threads``: where no Python thread runs, the end of every
request publishes. Outside of uWSGI this module does nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from typing import Any

import tapes
from tapes import forks, threads, under_uwsgi
from tapes.session import LocalSession

_log = logging.getLogger("tapes.contrib.uwsgi")


def _join() -> None:
    try:
        tapes.join()
        if not threads.can_run():  # nothing else publishes before the first request
            tapes.default_registry.session.request_ended(may_be_the_last=True)
    except tapes.TapesError as error:
        _log.error("tapes: this worker can't join: %s", error)


class _UnconnectedMaster(LocalSession):
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


def _leave_at_exit(uwsgi: Any) -> None:
    former = getattr(uwsgi, "atexit", None)

    def leave() -> None:
        forks.detect_fork()
        if former is not None:
            former()
        # Other threads of this worker answer requests until the process has exited.
        tapes.default_registry.session.resolved().leave()

    uwsgi.atexit = leave


def _install(uwsgi: Any) -> None:
    # The import takes the hook for itself, so it comes first. Without uWSGI's master it raises Exception.
    with contextlib.suppress(Exception):
        importlib.import_module("uwsgidecorators")
    _leave_at_exit(uwsgi)
    if uwsgi.worker_id():
        _join()
    else:
        if not tapes.default_registry.session.is_connected:
            tapes.default_registry.use(_UnconnectedMaster(uwsgi))  # the master isn't a worker
        under_uwsgi.after_worker_fork(forks.detect_fork, _join)


if "uwsgi" in sys.modules:
    _install(sys.modules["uwsgi"])
