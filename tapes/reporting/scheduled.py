"""Reports on a schedule, from a thread.

Theory. A schedule is a grid of moments: the start, and every interval after it. A report belongs to a moment
of the grid, so nothing drifts, however long a report takes. Moments that pass during a report are skipped and
counted. A run of the schedule is an object of its own: a run that hung when it was stopped can't disturb the
next one.

A report can be requested at any time. The schedule's own thread makes it, so there are never two at once. The
first report that begins after the request answers it, and the schedule does not change.

A thread does not survive a fork, and its work would be torn in the child. So it ends before a fork, and a new
one continues the schedule in both processes. A fork waits only briefly for a report that hangs. uWSGI forks
in C, where nothing can run before the fork: there the schedule begins in the workers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta

from tapes import forks, processes, shutdown, under_uwsgi
from tapes.clock import monotonic
from tapes.errors import InvalidArgument
from tapes.registry import Registry
from tapes.reporting.base import SKIPPED, Reporter

STOP_SECONDS = 2.0
"""Maximum seconds that `stop` waits for a report that is running and for the last one."""
_PAUSE_SECONDS = 0.25
"""Maximum seconds that a fork waits for a report that is running."""


class Grid:
    """The moments at which reports are due: ``interval_seconds`` apart, the first of them ``start``."""

    def __init__(self, interval_seconds: float, start: float) -> None:
        self._interval, self._start = interval_seconds, start
        self._number = 0

    @property
    def due(self) -> float:
        return self._start + self._number * self._interval

    @property
    def wait_seconds(self) -> float:
        """The seconds until the next report is due; at most what a thread can wait."""
        return min(max(0.0, self.due - monotonic()), threading.TIMEOUT_MAX)

    def pass_by(self, now: float) -> int:
        """Advance to the first moment after ``now``; return the number of moments that were skipped."""
        before = self._number
        self._number = max(before, int((now - self._start) // self._interval)) + 1
        return self._number - before - 1


class Run:
    """One run of a schedule, from its start until it is stopped."""

    def start(self) -> None:
        raise NotImplementedError

    def report_now(self, done: Callable[[], None]) -> None:
        """Report outside of the schedule, if possible, and then call ``done``."""
        done()

    def request_stop(self) -> None:
        """Have it report a last time and end; returns at once."""
        raise NotImplementedError

    def stop(self) -> None:
        """Wait for its end, until 2 s after `request_stop`."""
        raise NotImplementedError


class Scheduled(Reporter):
    """What reporters with a schedule share, whether a thread or a loop runs it."""

    def __init__(self, interval: timedelta, registry: Registry | None = None) -> None:
        if interval is None:
            raise InvalidArgument(f"the interval of {type(self).__name__}", got=None, expected="a timedelta")
        super().__init__(interval, registry)
        self._interval_seconds = interval.total_seconds()
        self._run: Run | None = None

    def start(self) -> None:
        """Report for the first time as soon as possible, then every interval; returns at once.

        Raises:
            InvalidArgument: If it was started already.
        """
        if self._run is not None:
            raise InvalidArgument(
                f"{type(self).__name__}.start() was called before", expected="one start() for each stop()"
            )
        self._run = run = self._begin(Grid(self._interval_seconds, monotonic()))
        shutdown.register(self._no_more_reports, shutdown.Phase.STOP_REPORTERS)
        shutdown.register(self.stop, shutdown.Phase.LAST_REPORT)
        try:
            run.start()
        except BaseException:
            self._forget_run()
            raise

    def stop(self) -> None:
        """Report a last time and end the schedule; does nothing if it was not started.

        Takes 2 s at most: a report that hangs is abandoned.
        """
        run = self._run
        if run is None:
            self._release()
            return
        self._forget_run()
        run.request_stop()
        run.stop()

    def _report_now(self, done: Callable[[], None]) -> None:
        if self._run is None:
            done()
        else:
            self._run.report_now(done)

    def _no_more_reports(self) -> None:
        if self._run is not None:
            self._run.request_stop()

    def _forget_run(self) -> None:
        self._run = None
        shutdown.unregister(self._no_more_reports)
        shutdown.unregister(self.stop)

    def _begin(self, grid: Grid) -> Run:
        raise NotImplementedError


class ScheduledReporter(Scheduled):
    """Calls `report` from a daemon thread: at once, then every interval, and a last time when it is stopped.

    Subclasses override `report`. An exception of it is counted in ``tapes.reports.failed``, logged once a
    minute at most, and does not end the schedule. If a report takes longer than the interval, the moments
    that it misses are counted in ``tapes.reports.skipped``.

    A forked child of a process that reports continues to report; a first call of `start` there does nothing.
    When the process exits, the reporter stops.

    Args:
        interval: The time between the beginnings of reports; a ``timedelta``.
        registry: What to report; the default registry if ``None``.

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

    def start(self) -> None:
        """Report from a thread, for the first time at once; returns at once.

        Raises:
            InvalidArgument: If it was started already.
        """
        forks.detect_fork()
        if self._run is not None and self._run.is_inherited:
            self._run.is_inherited = False
        else:
            super().start()

    def _begin(self, grid: Grid) -> Run:
        return _ThreadRun(self, grid)


class _Alarm(threading.Event):
    """Wakes a thread: to end if ``ends`` is set, otherwise to report now."""

    ends = False

    def end(self) -> None:
        self.ends = True
        self.set()


class _ThreadRun(Run):
    """A thread that reports at the moments of a grid; another one after each fork."""

    _thread: threading.Thread
    _alarm: _Alarm

    def __init__(self, reporter: Reporter, grid: Grid) -> None:
        self._reporter, self._grid = reporter, grid
        self._lock = threading.Lock()
        self._forks = 0
        self._stop_requested_at: float | None = None
        self._requests: deque[Callable[[], None]] = deque()
        self.is_inherited = False  # whether only a parent of this process has started it
        self._renew()
        forks.register_user(self)

    def start(self) -> None:
        if under_uwsgi.is_master():
            under_uwsgi.after_worker_fork(self._start_in_worker)
        else:
            self._thread.start()

    def _start_in_worker(self) -> None:
        forks.detect_fork()
        if self._stop_requested_at is None and self._thread.ident is None:
            self._thread.start()

    def report_now(self, done: Callable[[], None]) -> None:
        self._requests.append(done)
        self._alarm.set()

    def request_stop(self) -> None:
        if self._stop_requested_at is None:
            self._stop_requested_at = monotonic()
            self._alarm.end()

    def stop(self) -> None:
        since = 0.0 if self._stop_requested_at is None else monotonic() - self._stop_requested_at
        if not self._has_ended_within(max(0.0, STOP_SECONDS - since)):
            self._reporter._warn(f"its last report was not done within {STOP_SECONDS:g} s")

    def before_fork(self) -> None:
        """End the thread without a last report, unless a report takes too long."""
        with self._lock:  # threads may fork at the same time
            self._forks += 1
            is_ours = self._thread is threading.current_thread()  # a report that forks continues
            if self._forks == 1 and self._stop_requested_at is None and not is_ours:
                self._is_paused = True
                self._alarm.end()
                if not self._has_ended_within(_PAUSE_SECONDS):
                    self._is_paused = self._alarm.ends = False

    def after_in_parent(self) -> None:
        """Continue in another thread, unless the one before still runs."""
        with self._lock:
            self._forks -= 1
            if not self._forks and self._stop_requested_at is None and not self._thread.is_alive():
                self._renew()
                self._thread.start()

    def after_in_child(self, parent: processes.Process, version: int) -> None:
        self._lock = threading.Lock()
        self._forks = 0
        self._requests.clear()  # of the parent
        if self._stop_requested_at is None:
            if self._thread is threading.current_thread():
                self._alarm.end()
            self.is_inherited = True
            self._renew()
            self._thread.start()

    def after_in_helper(self) -> None:
        pass  # without its thread it does not report

    def _renew(self) -> None:
        self._alarm = _Alarm()
        if self._requests:  # of before the fork
            self._alarm.set()
        self._is_paused = False
        name = f"tapes-{type(self._reporter).__name__}"
        self._thread = threading.Thread(target=self._go, args=(self._alarm,), name=name, daemon=True)

    def _has_ended_within(self, timeout_seconds: float) -> bool:
        """Wait for the end of the thread; return whether it has ended, or is the calling thread."""
        if self._thread is threading.current_thread() or self._thread.ident is None:
            return True
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _go(self, alarm: _Alarm) -> None:
        while not alarm.ends:
            wait_seconds = self._grid.wait_seconds
            is_due = not alarm.wait(wait_seconds) or not wait_seconds
            alarm.clear()
            if alarm.ends:
                break
            if not (is_due or self._requests):  # a fork did not wait for a report to end
                continue
            self._report()
            missed = self._grid.pass_by(monotonic()) if is_due else 0
            if missed and not alarm.ends:
                self._reporter._count(SKIPPED, missed)
        if not self._is_paused:
            self._report()
            self._reporter._release()

    def _report(self) -> None:
        requests = [self._requests.popleft() for _ in range(len(self._requests))]  # later ones need another
        try:
            self._reporter.report()
        except BaseException as error:  # not even SystemExit may end the schedule
            self._reporter._failed(error)
        for done in requests:
            done()
