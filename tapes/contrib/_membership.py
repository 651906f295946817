"""How an adapter finds out that its process is one of several of a service, and joins them.

Signs of that are an address in the environment, uWSGI, gunicorn, Tornado's ``fork_processes``, a parent of
multiprocessing (uvicorn, hypercorn and granian have one), and ``wsgi.multiprocess``. A development server, a
test client and a notebook show none of them: there nothing is started, and the process answers for itself.

A process joins when its adapter is made, so that it counts before its first request. A thread does that, and
delays nothing. An adapter that is made in a server's master, not a worker, only chooses the address of
the service. The master's children join shortly after they are forked, and the master itself if it records
something after that. If ``wsgi.multiprocess`` is the only sign, a process joins with its first request.
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

from tapes import forks, processes, shutdown, threads
from tapes.environment import configured_address, is_disabled, is_spawned, may_start
from tapes.errors import AggregatorUnavailable, TapesError
from tapes.exposition.endpoint import Answer, answer, plain
from tapes.fork_flag import fork_flag
from tapes.registry import Registry
from tapes.service import this_service
from tapes.session import SHORTLY_SECONDS, address_for

_RETRY_SECONDS = 5.0  # seconds from one attempt to join to the next
_JOINING_SECONDS = 1.0  # maximum seconds that a reader and the exit wait for a thread that joins

_log = logging.getLogger("tapes.contrib")


class Membership:
    """The membership of this process in its service. Safe from any thread, and across forks.

    Byte 0 of ``mark`` is set once this process has called `begin`. Look at it at the start of every request,
    as servers that fork in C run no hook, and call `begin` if it is 0; see `tapes.fork_flag`.
    """

    def __init__(self, registry: Registry) -> None:
        self.mark = fork_flag()
        self.is_off = is_disabled()
        self._registry = registry
        self._states: dict[int, _ProcessState] = {}
        self._delayed = self._new_delayed()
        if self.is_off:
            return
        forks.register_user(self)
        if "uwsgi" in sys.modules:
            importlib.import_module("tapes.contrib.uwsgi")  # whose hooks have to be there before the fork
        else:
            self._join_from_the_start()

    @property
    def is_member(self) -> bool:
        return self._state().is_member

    @property
    def may_end_after_a_request(self) -> bool:
        """Whether the server may end this process after a request without a hook, as it forks for each."""
        return self._state().may_end

    def begin(self, multiprocess_hint: bool = False, is_development: bool = False) -> bool:
        """Notice that this is another process than before; return whether it has to `join`.

        ``multiprocess_hint``: the server states that it has several processes; ``is_development``: it is
        known for a development server.
        """
        forks.detect_fork()
        state = self._state()
        if not (self.is_off or state.is_member):
            known = bool(configured_address()) if is_development else is_one_of_several()
            state.is_member, state.is_hint = known or multiprocess_hint, not known
        state.may_end = multiprocess_hint and not _is_of_a_known_server()
        if state.may_end:
            self._registry.session.flush_per_request = True
        self.mark[0] = 1
        return state.is_member and state.joining is None and not _has_joined(self._registry)

    def join(self) -> None:
        """Join the other processes, once; if that fails, log the reason, and give it in every answer.

        While one thread joins, others do not wait: what they record is published afterwards.
        """
        state = self._state()
        if not state.join_lock.acquire(False):
            return
        state.joining = state.joining or threading.Event()
        try:
            _join(self._registry, state.is_hint)
            state.problem = ""
        except TapesError as error:
            if str(error) != state.problem:
                state.problem = str(error)
                _log.warning("tapes: this process can't join the others of its service: %s", error)
        except Exception as error:
            state.problem = f"an unexpected error ({error!r})"
            _log.exception("tapes: this process can't join the others of its service")
        finally:
            state.tried = time.monotonic()
            state.joining.set()
            state.join_lock.release()

    def leave(self) -> None:
        """Flush and disconnect; the next request, if there is one, joins again."""
        self._await_joining()
        self.join_again()
        try:
            self._registry.session.resolved().leave()
        except Exception:
            _log.exception("tapes could not send the last values of this process")

    def join_again(self) -> None:
        """Have the next request, if there is one, join."""
        self.mark[0] = 0
        self._states.clear()

    def before_fork(self) -> None:
        self._delayed.pause()

    def after_in_parent(self) -> None:
        self._delayed.resume()
        if not self._state().is_member and _makes_workers():
            self._registry.session.become_master(lambda: _connect(self._registry))

    def after_in_child(self, parent: processes.Process, version: int) -> None:
        self._states.clear()
        self._delayed = self._new_delayed()
        if _makes_workers():
            self._delayed.start()

    def after_in_helper(self) -> None:
        """Called in a child that is not a worker; it does not join."""

    def answer(self, accept: str = "", query: str = "") -> Answer:
        """Return the metrics of the whole service, or a 503 with the reason; may wait a second."""
        if self.is_off:
            return plain(503, "tapes is turned off (TAPES_DISABLED).")
        state = self._state()
        if state.is_member:
            self._await_joining()
            is_connected = self._registry.session.resolved().is_connected
            if not is_connected and time.monotonic() - state.tried > _RETRY_SECONDS:
                self.join()
            if not self._registry.session.is_connected:
                return plain(
                    503,
                    "This process is one of several and has not joined the others, so it can't answer for "
                    f"the service: {state.problem or 'it is joining; try again in a second'}.",
                )
        return answer(self._registry, accept, query)

    def _state(self) -> _ProcessState:
        return self._states.setdefault(os.getpid(), _ProcessState())

    def _await_joining(self) -> None:
        joining = self._state().joining
        if joining is not None:
            joining.wait(_JOINING_SECONDS)

    def _new_delayed(self) -> threads.Delayed:
        return threads.Delayed(self._join_from_the_start, SHORTLY_SECONDS, "tapes-join")

    def _join_from_the_start(self) -> None:
        """Join in a thread, if this process is one of several; a master only chooses the address."""
        try:
            if is_spawned() and multiprocessing.parent_process() is None:
                self._delayed.start()  # its main module is still being imported
                return
            if not is_one_of_several() or _is_of_a_pool():
                return
            _choose_address(self._registry)
            if _is_master():
                return
            state = self._state()
            state.joining = threading.Event()
            state.is_member = True
            worker = threads.NativeThread(self._keep_joining, "tapes-join", is_bare=True)
            try:
                worker.start()
                shutdown.register(self._await_joining, shutdown.Phase.CONNECT)
            except RuntimeError:  # no thread can be started: the first request joins
                state.joining = None
        except Exception as error:
            _log.warning("tapes: this process can't join the others of its service yet: %s", error)

    def _keep_joining(self) -> None:
        """Join; if that fails, try again, as this process counts with or without requests."""
        state = self._state()
        if _has_joined(self._registry) and state.joining is not None:
            self._registry.session.open()  # inherited from its master, it sleeps until something is recorded
            state.joining.set()
            return
        while state is self._states.get(os.getpid()) and is_one_of_several():
            self.join()
            if not state.problem:
                return
            threads.unpatched("time", "sleep")(_RETRY_SECONDS)


class _ProcessState:
    """What is known of one process."""

    def __init__(self) -> None:
        self.is_member = False  # whether it is one of several, as far as is known yet
        self.is_hint = False  # whether the server's statement is the only sign of that
        self.may_end = False
        self.join_lock = threading.Lock()
        self.joining: threading.Event | None = None  # set when an attempt has ended; None before that
        self.tried, self.problem = 0.0, ""  # when the last attempt ended, and why it failed


def is_one_of_several() -> bool:
    """Return whether this process belongs to a service of many processes, as far as it can see."""
    return bool(configured_address()) or _is_of_a_known_server()


def _is_of_a_known_server() -> bool:
    if "uwsgi" in sys.modules or _is_of_gunicorn():
        return True
    tornado: Any = sys.modules.get("tornado.process")
    if tornado is not None and tornado.task_id() is not None:
        return True
    return multiprocessing.parent_process() is not None and not _is_only_child()


def _is_of_gunicorn() -> bool:
    is_named = os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/")
    return is_named and "gunicorn.arbiter" in sys.modules


def _is_master() -> bool:
    """Return whether this is gunicorn's master, which loads the application with ``--preload``.

    A worker runs within the master's method that made it, so that is on the stack of its main thread.
    """
    if not _is_of_gunicorn():
        return False
    main_thread = sys._current_frames().get(threading.main_thread().ident or 0)
    names = _functions_of(main_thread, "gunicorn.arbiter")
    return bool(names) and "spawn_worker" not in names


def _makes_workers() -> bool:
    """Return whether a server is forking one of its workers; call it in a fork hook."""
    return bool(_functions_of(sys._getframe(), "gunicorn.arbiter", "tornado.process"))


def _functions_of(frame: Any, *modules: str) -> set[str]:
    """Return the names of the functions of ``modules`` in the call stack of ``frame``."""
    names = set()
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def _is_of_a_pool() -> bool:
    """Return whether this is a child of a pool, which is not a server: only a request joins."""
    target = getattr(multiprocessing.current_process(), "_target", None)
    return getattr(target, "__module__", "") in ("multiprocessing.pool", "concurrent.futures.process")


def _is_only_child() -> bool:
    """Return whether the parent of multiprocessing is a reloader, or a server with one worker alone."""
    # uvicorn and hypercorn keep their configuration there.
    config: Any = getattr(multiprocessing.current_process(), "_kwargs", {}).get("config")
    reloads = getattr(config, "should_reload", False) or getattr(config, "use_reloader", False)
    return bool(reloads) or getattr(config, "workers", 2) == 1 or "--reload" in sys.argv


def _has_joined(registry: Registry) -> bool:
    return registry.session.resolved().has_aggregator()


def _choose_address(registry: Registry) -> None:
    """Choose the address of the service, for this process and for all that it starts."""
    if may_start() and not configured_address() and not hasattr(registry, "socket_addr"):
        forks.import_module("tapes.distributed.supervision.rendezvous").choose_address(this_service())


def _join(registry: Registry, is_hint: bool) -> None:
    if not may_start() and not configured_address() and not hasattr(registry, "socket_addr"):
        raise AggregatorUnavailable(
            "TAPES_AUTOSTART=0 does not allow this process to start an aggregator",
            remedy="set TAPES_ADDR to the address of one, or start the server by tapes run -- COMMAND",
        )
    if is_hint and this_service().root == forks.this_process():
        raise AggregatorUnavailable(
            "the server has several processes, but what they have in common can't be seen",
            remedy="start it by tapes run -- COMMAND, or set TAPES_ADDR to where they are to meet",
        )
    address = getattr(registry, "socket_addr", None)
    forks.import_module("tapes.distributed.connection").join(registry, address)


def _connect(registry: Registry) -> None:
    """Connect the registry of a master to the aggregator of its workers."""
    address = address_for(registry)
    if address:
        forks.import_module("tapes.distributed.connection").connect(registry, address)
