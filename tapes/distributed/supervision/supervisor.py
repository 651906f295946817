"""The supervisor: a small parent process that starts another aggregator when the last one dies.

An aggregator that a program starts with `RegistryAggregator.start` always has one. An aggregator that a
worker starts has one only where its parent would be a process that reaps no children: there a killed
aggregator would remain as a zombie.

The supervisor has no sockets and no threads. It waits for its child, and it is a fork of the process in which
the reporters were created, so it can fork another aggregator at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable

from tapes.backoff import Backoff
from tapes.distributed.supervision.readiness import Readiness
from tapes.processes import Process, lives

_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.1, 5.0
_TERM_SECONDS = 0.2  # between two SIGTERM to an aggregator that has to end
_STABLE_SECONDS = 10.0  # minimum lifetime of an aggregator that is restarted without a pause
_BRIEF_SECONDS, _MAX_BRIEF = 0.5, 10
"""Maximum seconds of a brief lifetime, and maximum number of aggregators in a row that have one."""

_log = logging.getLogger("tapes.distributed")


class Supervisor:
    """Runs an aggregator in a child of this process, and another one whenever that dies.

    Args:
        run_aggregator: Runs one and returns its exit status. Gets the `Readiness` to report to, and whether
            the aggregator has to end at once, after it has cleaned up.
        owner: The process that the aggregator serves; `run` returns when it has ended.
    """

    def __init__(self, run_aggregator: Callable[[Readiness, bool], int], owner: Process) -> None:
        self._run_aggregator = run_aggregator
        self._owner = owner
        self._child = 0
        self._stop_requested = False

    def run(self, readiness: Readiness) -> int:
        """Return when an aggregator has exited normally or can't be started, with its exit status."""
        # 1. Ignore the terminal's signals; pass SIGTERM on.
        for terminal in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(terminal, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGALRM, self._on_term)
        # 2. Run the first aggregator; an error in its configuration is final.
        backoff, pause, started = Backoff(_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS), 0.0, time.monotonic()
        status = self._run_once(readiness)
        if status == Readiness.NOT_READY:
            return status
        # 3. Run another one each time that one dies, as long as it is needed.
        while status != 0 and not (self._stop_requested and status == Readiness.NOT_READY):
            if not lives(self._owner):
                break
            if time.monotonic() - started > _STABLE_SECONDS:
                backoff.reset()
                pause = 0.0
            cause = f"signal {-status}" if status < 0 else f"exit status {status}"
            _log.warning("a tapes aggregator died (%s); another one is started", cause)
            self._sleep(pause)
            pause, started = backoff.next(), time.monotonic()
            status = self._run_once(Readiness((-1, -1)))
        return status

    def run_while_killed(self, readiness: Readiness) -> int:
        """Return when an aggregator has ended without being killed, with its exit status.

        There is no pause: after a second workers start an aggregator too, and the later of the two would
        become a zombie. After ten that were killed at once in a row, only workers start one, with pauses.
        """
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        brief = 0
        while True:
            started = time.monotonic()
            status = self._run_once(readiness)
            brief = brief + 1 if time.monotonic() - started < _BRIEF_SECONDS else 0
            if status >= 0 or brief == _MAX_BRIEF:
                return status
            _log.warning("a tapes aggregator was killed (signal %d); another one is started", -status)
            readiness = Readiness((-1, -1))

    def _run_once(self, readiness: Readiness) -> int:
        """Run one aggregator to its end; return its exit status, or minus the signal that killed it."""
        self._child = os.fork()
        if self._child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # before and after it has its own handler
            status = 1
            try:
                status = self._run_aggregator(readiness, self._stop_requested)
            finally:
                os._exit(status)
        readiness.close()
        os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)
        # Forget the pid before the child is reaped: after that it may be another process's.
        child, self._child = self._child, 0
        _, status = os.waitpid(child, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop_requested:
            time.sleep(0.05)

    def _on_term(self, number: int, frame: object) -> None:
        """Pass SIGTERM on, repeatedly: the aggregator may have no handler yet."""
        self._stop_requested = True
        signal.setitimer(signal.ITIMER_REAL, _TERM_SECONDS)
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)
