"""Joining by itself: an adapter finds out whether its process is one of a service's several, and joins them.

What tells: an address from the environment, uWSGI, gunicorn, Tornado's ``fork_processes``, a parent of
multiprocessing (uvicorn, hypercorn and granian have one), and ``wsgi.multiprocess``. A development server, a
test client and a notebook are none of these: there nothing is started, and the process answers for itself.

A process joins before its first request is answered, or when its lifespan starts, and not when the adapter is
made: that may be in a parent that forks later.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
import threading
import time
from typing import Any

from tapes import forks
from tapes.environment import address_told, is_disabled, may_start
from tapes.errors import AggregatorUnavailable, TapesError
from tapes.exposition.endpoint import Answer, answer, plain
from tapes.registry import Registry, default_registry

__all__ = ["Membership", "is_one_of_several"]

_RETRY_SECONDS = 5.0
_JOINING_SECONDS = 1.0

_log = logging.getLogger("tapes.contrib")


class Membership:
    """Whether this process has found its place in the service. Safe from any thread, and across forks.

    Attributes:
        mark: Its byte 0 says whether this process has. Look at it at the start of every request, as servers
            that fork in C run no hook, and call `begin` if it is 0; see `tapes.forks.mark`.
        is_off: Whether tapes is turned off (``TAPES_DISABLED=1``).
    """

    def __init__(self, registry: Registry) -> None:
        self.mark = forks.mark()
        self.is_off = is_disabled()
        self._registry = registry
        self._of_process: dict[int, _Here] = {}
        if "uwsgi" in sys.modules and not self.is_off:
            importlib.import_module("tapes.contrib.uwsgi")  # whose hooks have to be there before the fork

    def begin(self, says_several: bool = False, is_development: bool = False) -> bool:
        """Notice that this is another process than before; return whether it has to `join`.

        Args:
            says_several: Whether the server says that there are several.
            is_development: Whether it is known for a development server.
        """
        forks.check()
        here = self._here()
        if not (self.is_off or here.is_member):
            known = bool(address_told()) if is_development else is_one_of_several()
            here.is_member, here.is_claim = known or says_several, not known
        self.mark[0] = 1
        return here.is_member and here.joining is None and not _has_joined(self._registry)

    def join(self) -> None:
        """Join the other processes, once; if that can't be done, say so in the log and in every answer.

        Whoever comes while another thread joins does not wait: what it records is told when that is done.
        """
        here = self._here()
        if not here.turn.acquire(False):
            return
        here.joining = threading.Event()
        try:
            _join(self._registry, here.is_claim)
            here.problem = ""
        except TapesError as error:
            if str(error) != here.problem:
                here.problem = str(error)
                _log.warning("tapes: this process can't join the others of its service: %s", error)
        except Exception as error:
            here.problem = f"an unexpected error ({error!r})"
            _log.exception("tapes: this process can't join the others of its service")
        finally:
            here.tried = time.monotonic()
            here.joining.set()
            here.turn.release()

    def leave(self) -> None:
        """Hand over the last values; the next request, if there is one, joins again."""
        self.mark[0] = 0
        self._of_process.clear()
        if self._registry.connection is not None:
            try:
                _leave(self._registry)
            except Exception:
                _log.exception("tapes could not say goodbye")

    def _here(self) -> _Here:
        return self._of_process.setdefault(os.getpid(), _Here())

    def answer(self, accept: str = "", query: str = "") -> Answer:
        """Return the metrics of the whole service, or a 503 that says what is wrong; may wait a second."""
        if self.is_off:
            return plain(503, "tapes is turned off (TAPES_DISABLED).")
        here = self._here()
        if here.is_member:
            if here.joining is not None:
                here.joining.wait(_JOINING_SECONDS)
            if self._registry.connection is None and time.monotonic() - here.tried > _RETRY_SECONDS:
                self.join()
            if self._registry.connection is None:
                return plain(
                    503,
                    "This process is one of several and has not joined the others, so it can't answer for "
                    f"the service: {here.problem or 'it is about to'}.",
                )
        return answer(self._registry, accept, query)


class _Here:
    """What is known of one process."""

    def __init__(self) -> None:
        self.is_member = False
        self.is_claim = False  # as nobody but the server says so
        self.turn = threading.Lock()
        self.joining: threading.Event | None = None
        self.tried = 0.0
        self.problem = ""


def is_one_of_several() -> bool:
    """Return whether this process belongs to a service of many processes, as far as can be seen from here."""
    if address_told() or "uwsgi" in sys.modules:
        return True
    if "gunicorn.arbiter" in sys.modules and os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/"):
        return True
    tornado: Any = sys.modules.get("tornado.process")
    if tornado is not None and tornado.task_id() is not None:
        return True
    return multiprocessing.parent_process() is not None and not _is_only_child()


def _is_only_child() -> bool:
    """Return whether the parent of multiprocessing is a reloader, or a server with one worker alone."""
    # Where uvicorn and hypercorn keep what they were told.
    config: Any = getattr(multiprocessing.current_process(), "_kwargs", {}).get("config")
    reloads = getattr(config, "should_reload", False) or getattr(config, "use_reloader", False)
    return bool(reloads) or getattr(config, "workers", 2) == 1 or "--reload" in sys.argv


def _has_joined(registry: Registry) -> bool:
    if registry.connection is None:
        return False
    from tapes.distributed.joining import lacks_aggregator

    return not lacks_aggregator(registry)


def _join(registry: Registry, is_claim: bool) -> None:
    if not may_start() and not address_told() and not hasattr(registry, "socket_addr"):
        raise AggregatorUnavailable(
            "TAPES_AUTOSTART=0 forbids to start an aggregator",
            remedy="set TAPES_ADDR to the address of one, or start the server by tapes run -- COMMAND",
        )
    from tapes.distributed.joining import join, supervisor

    if is_claim and supervisor().process == forks.this_process():
        raise AggregatorUnavailable(
            "the server says that there are several processes, but what they have in common can't be seen",
            remedy="start it by tapes run -- COMMAND, or set TAPES_ADDR to where they are to meet",
        )
    join(registry, getattr(registry, "socket_addr", None))


def _leave(registry: Registry) -> None:
    if registry is default_registry:
        registry.connect_when_used = None
    from tapes.distributed.connection import leave

    leave(registry)
