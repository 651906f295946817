"""The small parent of an aggregator: it starts another one when that dies.

An aggregator that was started by hand has one; one that a service started has one only where its parent would
be a process that reaps no children, as a killed aggregator would stay there as a zombie.

It holds no sockets and runs no threads: it waits for its child, and is a fork of the process that the
reporters were made in, so another aggregator can be forked from it at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable

from tapes.distributed.supervision.readiness import Readiness
from tapes.processes import Process, lives

__all__ = ["Supervisor"]

_MAX_BACK_OFF_SECONDS = 5.0
_AGAIN_SECONDS = 0.2
_STABLE_SECONDS = 10.0
"""An aggregator that lived so long is started again without delay."""
_BRIEF_SECONDS, _MAX_BRIEF = 0.5, 10
"""Seconds of a brief life, and maximum number of aggregators in a row that had one."""

_log = logging.getLogger("tapes.distributed")


class Supervisor:
    """Runs an aggregator in a child of this process, and another one whenever it dies.

    Args:
        run: Runs an aggregator, told on a `Readiness` how it starts, and whether it is to end at once, after
            clearing up; returns an exit status.
        owner: Whom it serves; used by `run`, which ends when that has ended.
    """

    def __init__(self, run: Callable[[Readiness, bool], int], owner: Process) -> None:
        self._run = run
        self._owner = owner
        self._child = 0
        self._ends = False

    def run(self, readiness: Readiness) -> int:
        """Return when the aggregator has left by itself, or could not be started, with its exit status."""
        for terminal in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(terminal, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGALRM, self._on_term)
        status, started, back_off = self._once(readiness), time.monotonic(), 0.0
        if status == Readiness.NOT_READY:
            return status
        while status != 0 and not (self._ends and status == Readiness.NOT_READY) and lives(self._owner):
            if time.monotonic() - started > _STABLE_SECONDS:
                back_off = 0.0
            _log.warning(
                "a tapes aggregator died (%s); another one is started",
                f"signal {-status}" if status < 0 else f"exit status {status}",
            )
            self._pause(back_off)
            back_off = min(max(0.1, 2 * back_off), _MAX_BACK_OFF_SECONDS)
            started = time.monotonic()
            status = self._once(Readiness((-1, -1)))
        return status

    def run_while_killed(self, readiness: Readiness) -> int:
        """Return when the aggregator has ended, and was not killed, with its exit status.

        There is no pause: workers start another one after a second, and whichever comes second would be a
        zombie. They do it alone, with pauses, if ten have been killed as soon as they were started.
        """
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        brief = 0
        while True:
            started = time.monotonic()
            status = self._once(readiness)
            brief = brief + 1 if time.monotonic() - started < _BRIEF_SECONDS else 0
            if status >= 0 or brief == _MAX_BRIEF:
                return status
            _log.warning("a tapes aggregator was killed (signal %d); another one is started", -status)
            readiness = Readiness((-1, -1))

    def _once(self, readiness: Readiness) -> int:
        """Run one aggregator to its end; return its exit status, or minus the signal that killed it."""
        self._child = os.fork()
        if self._child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until it has a handler of its own, and after that
            status = 1
            try:
                status = self._run(readiness, self._ends)
            finally:
                os._exit(status)
        readiness.close()
        os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)
        child, self._child = self._child, 0  # as long as it is not reaped its pid is its own
        _, status = os.waitpid(child, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._ends:
            time.sleep(0.05)

    def _on_term(self, number: int, frame: object) -> None:
        """Pass it on, again and again, as the aggregator may have had no handler yet."""
        self._ends = True
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)
