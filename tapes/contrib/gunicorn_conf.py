"""A gunicorn configuration that makes every worker answer for the whole service.

    gunicorn -w 4 -c python:tapes.contrib.gunicorn_conf app:app

It starts an aggregator for gunicorn's master, connects every worker to it, and flushes when a worker exits.
The master connects if it records something itself, as in a hook of your own. A master that exits waits for
the aggregator's reporters, because in a container its end also ends the aggregator; elsewhere the aggregator
exits when masters and workers have. With root and ``--user`` it runs as that user.

For settings of your own, write a configuration that imports these hooks. A hook of your own with the name of
one of these runs beside it with `with_tapes`::

    from tapes.contrib.gunicorn_conf import *

    bind = "127.0.0.1:8000"

    @with_tapes
    def post_fork(server, worker):
        server.log.info("worker %s is ready", worker.pid)

gunicorn takes every public global of this module that has the name of a setting for one, so other names
begin with an underscore.
"""

import functools as _functools
import os as _os
import sys as _sys
from collections.abc import Callable as _Callable
from typing import Any as _Any

import tapes as _tapes

__all__ = ["on_exit", "on_starting", "post_fork", "with_tapes", "worker_exit"]

_registry = _tapes.default_registry
# The master is not a worker, whatever TAPES_ADDR is.
_registry.session.stay_local()


def on_starting(server: _Any) -> None:
    """Start the aggregator, or join the one of the master that this one replaces.

    If that fails, end gunicorn with a sentence that gives the reason.
    """
    try:
        from tapes.environment import is_disabled, may_start

        if is_disabled():
            return
        _registry.session.stay_local(connect_in_master=_tapes.connect)
        if not may_start():
            return
        from tapes.distributed.storage.runtime_directory import User
        from tapes.distributed.supervision.rendezvous import ensure_aggregator
        from tapes.forks import this_process
        from tapes.service import Service

        user = User(server.cfg.uid, server.cfg.gid) if _os.geteuid() == 0 else User.ourselves()
        endpoints = ensure_aggregator(Service(this_process(), f"gunicorn (pid {_os.getpid()})"), user=user)
        # A master that replaces this one (USR2) is given the environment that this one began with.
        getattr(server.cfg, "env_orig", {})["TAPES_ADDR"] = endpoints.publish
    except _tapes.TapesError as error:
        if server.pidfile is not None:
            server.pidfile.unlink()
        _sys.exit(f"tapes: {error}")


def post_fork(server: _Any, worker: _Any) -> None:
    """Connect the worker to the aggregator."""
    _tapes.connect()


def worker_exit(server: _Any, worker: _Any) -> None:
    """Flush the worker's last values to the aggregator."""
    _registry.session.resolved().leave()


def on_exit(server: _Any) -> None:
    """Wait until the aggregator has reported the last values of killed workers; 1 s at most.

    Workers that exit have waited for that themselves. The aggregator runs on, as other processes may use it.
    During an upgrade (USR2), while there is another master, this does nothing.
    """
    if server.reexec_pid or (server.master_pid and server.master_pid == _os.getppid()):
        return
    try:
        from tapes.environment import is_disabled

        if is_disabled() or not _os.environ.get("TAPES_ADDR"):
            return
        from tapes.distributed.storage.locks import is_served
        from tapes.distributed.transport.address import resolve
        from tapes.distributed.transport.requests import flush

        endpoints = resolve(None)
        if endpoints.path is None or is_served(endpoints):
            flush(endpoints)
    except _tapes.TapesError as error:
        server.log.warning("tapes: %s", error)


def with_tapes(hook: _Callable[..., None]) -> _Callable[..., None]:
    """Return ``hook`` together with the hook of tapes of the same name; as a decorator.

    When something starts, the hook of tapes runs first; when something ends, it runs last. So what ``hook``
    records is counted.

    Raises:
        InvalidArgument: If tapes has no hook of that name; then ``hook`` needs no decorator.
    """
    name = getattr(hook, "__name__", "")
    hooks: _Any = {h.__name__: h for h in (on_exit, on_starting, post_fork, worker_exit)}
    if name not in hooks:
        from tapes.errors import InvalidArgument

        raise InvalidArgument(
            "with_tapes", got=name, expected=f"a hook named {', '.join(hooks)}",
            remedy="leave it out: tapes has no hook of that name",
        )  # fmt: skip

    @_functools.wraps(hook)
    def both(server: _Any, worker: _Any = None) -> None:
        arguments = (server,) if worker is None else (server, worker)
        is_last = name in ("on_exit", "worker_exit")
        if not is_last:
            hooks[name](*arguments)
        try:
            hook(*arguments)
        finally:
            if is_last:
                hooks[name](*arguments)

    return both
