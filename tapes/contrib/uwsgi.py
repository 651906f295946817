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

__all__: list[str] = []

_log = logging.getLogger("tapes.contrib.uwsgi")


def _join() -> None:
    try:
        tapes.join()
        connection = tapes.default_registry.connection
        if connection is not None and not threads.can_run():
            connection.request_ended(may_be_the_last=True)  # nothing else publishes before the first request
    except tapes.TapesError as error:
        _log.error("tapes: this worker can't join: %s", error)


def _leave() -> None:
    """Say goodbye; other threads of this worker go on to answer requests until the process is gone."""
    if tapes.default_registry.connection is not None:
        forks.import_module("tapes.distributed.connection").leave(tapes.default_registry)


def _after(before: Callable[[], Any] | None, ours: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        # uWSGI forks in C and runs no hook of Python: what ``before`` counts belongs to the child.
        forks.detect_fork()
        if before is not None:
            before()
        ours()

    return both


def _note_lost(uwsgi: Any) -> bool:
    """Log once that values are lost which uWSGI's master records after it has forked its workers.

    The master can't connect: a thread of tapes in it could hold a lock while uWSGI forks in C.
    """
    if uwsgi.masterpid() == os.getpid():
        if not any(worker["pid"] for worker in uwsgi.workers()):
            return False  # values from before the fork count: every worker publishes them
        tapes.default_registry.first_use.wake = None
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
        tapes.default_registry.connect_when_used = None  # the master is no worker
        tapes.default_registry.first_use.sleep(lambda: _note_lost(uwsgi))
        uwsgi.post_fork_hook = _after(getattr(uwsgi, "post_fork_hook", None), _join)


if "uwsgi" in sys.modules:
    _install(sys.modules["uwsgi"])
