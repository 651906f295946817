"""Reports on a schedule, from a thread.

Theory. A schedule is a grid of moments: the start, and every interval after it. A report belongs to a moment
of the grid, so nothing drifts, whatever a report takes; moments that pass while a report is under way are
skipped and counted. A run of the schedule is an object that its thread holds: one that was left behind, as it
hung when it was stopped, can't disturb the next.

A thread does not survive a fork, and what it was doing would be torn in the child. So it ends before a fork,
and the schedule goes on by new ones in both processes.
"""

from __future__ import annotations

import threading
from datetime import timedelta

from tapes import forks
from tapes.clock import monotonic
from tapes.endings import LAST_REPORT, at_end, forget
from tapes.errors import InvalidArgument
from tapes.registry import Registry
from tapes.reporting.base import SKIPPED, Reporter

__all__ = ["STOP_SECONDS", "Grid", "Run", "Scheduled", "ScheduledReporter"]

STOP_SECONDS = 2.0
"""So long `stop` waits for a report that is under way and for the final one."""
_PAUSE_SECONDS = 1.0
"""So long a fork waits for a report that is under way."""


class Grid:
    """The moments at which reports are due: ``interval_seconds`` apart, the first of them ``start``."""

    def __init__(self, interval_seconds: float, start: float) -> None:
        self._interval = interval_seconds
        self._start = start
        self._number = 0

    @property
    def due(self) -> float:
        """When the next report is due."""
        return self._start + self._number * self._interval

    def pass_by(self, now: float) -> int:
        """Go on to the first moment after ``now``; return how many were left out on the way there."""
        before = self._number
        self._number = max(before, int((now - self._start) // self._interval)) + 1
        return self._number - before - 1


class Run:
    """A schedule that is kept from its start until it is stopped."""

    def start(self) -> None:
        """Begin with it."""
        raise NotImplementedError

    def stop(self) -> None:
        """Report a last time, and end it."""
        raise NotImplementedError


class Scheduled(Reporter):
    """What reporters with a schedule share, whoever keeps it."""

    def __init__(self, interval: timedelta, registry: Registry | None = None) -> None:
        if interval is None:
            raise InvalidArgument(f"the interval of {type(self).__name__}", got=None, expected="a timedelta")
        super().__init__(interval, registry)
        self._interval_seconds = interval.total_seconds()
        self._run: Run | None = None

    def start(self) -> None:
        """Report for the first time as soon as may be, and every interval from then on; returns at once.

        Raises:
            InvalidArgument: If it was started already.
        """
        forks.check()
        if self._run is not None:
            raise InvalidArgument(
                f"{type(self).__name__}.start() was called before", expected="one start() for each stop()"
            )
        self._run = self._begin(Grid(self._interval_seconds, monotonic()))
        forks.add_user(self)
        at_end(self.stop, LAST_REPORT)
        self._run.start()

    def stop(self) -> None:
        """Report a last time and end the schedule; nothing if it wasn't started.

        Takes 2 s at most: a report that hangs is left to itself.
        """
        forget(self.stop)
        run, self._run = self._run, None
        if run is not None:
            run.stop()

    def _begin(self, grid: Grid) -> Run:
        raise NotImplementedError


class ScheduledReporter(Scheduled):
    """Calls `report` from a daemon thread: at once, then every interval, and a last time when it is stopped.

    Subclasses override `report`. What it raises is counted in ``tapes.reports.failed``, logged once a minute
    at most, and does not end the schedule. If a report takes longer than the interval, the moments that it
    misses are counted in ``tapes.reports.skipped``.

    A forked child of a process that reports goes on reporting by itself; a first call of `start` there does
    nothing. At the end of the process the reporter stops by itself.

    Args:
        interval: The time between the beginnings of reports; a ``timedelta``.
        registry: What to report; the default registry if ``None``.

    Raises:
        InvalidArgument: If the interval is not a positive ``timedelta``.

    Example:
        >>> import tapes, datetime
        >>> class Printer(tapes.reporting.ScheduledReporter):
        ...     def report(self):
        ...         print(self.registry.get_stats().jobs.done.value)
        >>> registry = tapes.Registry()
        >>> registry.counter("jobs.done").increment()
        >>> Printer(datetime.timedelta(seconds=10), registry).report()
        1
    """

    _run: _ThreadRun | None
    _goes_on = False

    def start(self) -> None:
        """Report from a thread, for the first time at once; raises as `Scheduled.start`."""
        forks.check()
        if self._goes_on:
            self._goes_on = False
        else:
            super().start()

    def stop(self) -> None:
        """Report a last time and end the thread; nothing if it wasn't started; see `Scheduled.stop`."""
        self._goes_on = False
        super().stop()

    def before_fork(self) -> None:
        """End the thread; what it is about may take a second."""
        if self._run is not None:
            self._run.pause()

    def go_on(self) -> None:
        """In the parent after a fork, have another thread go on with the same schedule."""
        if self._run is not None:
            self._run = self._run.resumed()
            self._run.start()

    def forked(self, parent: forks.Process, version: int) -> None:
        """Likewise in a forked child."""
        self._goes_on = self._run is not None
        self.go_on()

    def _begin(self, grid: Grid) -> Run:
        return _ThreadRun(self, grid)


class _ThreadRun(Run):
    """A thread that reports at the moments of a grid, until it is stopped or paused."""

    def __init__(self, reporter: Reporter, grid: Grid) -> None:
        self._reporter = reporter
        self._grid = grid
        self._ending = threading.Event()
        self._is_paused = False
        self._thread = threading.Thread(target=self._go, name=f"tapes-{type(reporter).__name__}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if not self._end(STOP_SECONDS):
            self._reporter.warn(f"its last report was not done within {STOP_SECONDS:g} s")

    def pause(self) -> None:
        """End it without a last report."""
        self._is_paused = True
        self._end(_PAUSE_SECONDS)

    def resumed(self) -> _ThreadRun:
        """Return one that goes on where this one was paused."""
        return _ThreadRun(self._reporter, self._grid)

    def _end(self, timeout_seconds: float) -> bool:
        self._ending.set()
        if self._thread is not threading.current_thread():  # else it is report() that calls
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _go(self) -> None:
        while not self._ending.wait(max(0.0, self._grid.due - monotonic())):
            self._report()
            missed = self._grid.pass_by(monotonic())
            if missed and not self._ending.is_set():
                self._reporter.count(SKIPPED, missed)
        if not self._is_paused:
            self._report()

    def _report(self) -> None:
        try:
            self._reporter.report()
        except BaseException as error:  # nothing that ends a thread may end the schedule
            self._reporter.failed(error)
