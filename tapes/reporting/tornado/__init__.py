"""Reports on the schedule of a Tornado IOLoop, without blocking the loop.

Theory. The loop keeps the schedule. An ``async def report`` runs on the loop, as it awaits. Any other
``report`` may block: it runs in a daemon thread of its own, so it must not touch objects of the loop. There
is one report at a time; those that become due meanwhile are skipped and counted.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tapes import shutdown
from tapes.clock import monotonic
from tapes.errors import MissingExtra
from tapes.registry import Registry
from tapes.reporting.base import SKIPPED, Reporter
from tapes.reporting.scheduled import STOP_SECONDS, Grid, Run, Scheduled

try:
    from tornado import gen
    from tornado.ioloop import IOLoop
except ImportError:
    raise MissingExtra("tapes.reporting.tornado", "tornado") from None

__all__ = ["TornadoScheduledReporter"]


class TornadoScheduledReporter(Scheduled):
    """Calls `report` on the schedule of an IOLoop: at once, then every interval, and when it is stopped.

    Subclasses override `report`: with ``async def`` it runs on the loop, with ``def`` in a thread of its own,
    so it never blocks the loop. An exception of it is counted in ``tapes.reports.failed``, logged once a
    minute at most, and does not end the schedule. Reports that become due while one runs are skipped and
    counted in ``tapes.reports.skipped``.

    Call its methods on the loop's thread. Start it after ``fork()``, like the loop itself.

    Args:
        interval: The time between the beginnings of reports; a ``timedelta``.
        registry: What to report; the default registry if ``None``.
        io_loop: The loop; the current one of `start` if ``None``.
    """

    _run: _LoopRun | None

    def __init__(
        self, interval: timedelta, registry: Registry | None = None, io_loop: IOLoop | None = None
    ) -> None:
        super().__init__(interval, registry)
        self.io_loop = io_loop

    def start(self) -> None:
        """Report as soon as the loop runs, then every interval; returns at once.

        Raises:
            InvalidArgument: If it was started already.
        """
        if self._run is not None and self._run.pid != os.getpid():
            self._forget_run()
        super().start()

    def stop(self) -> None:
        """Report a last time and end the schedule; does nothing if it was not started.

        If the loop runs, it returns at once. The last report is made in a thread, and the exit of the process
        waits for it, 2 s at most. With ``async def`` it is made on the loop, if that continues to run. If the
        loop does not run, `stop` waits for the report itself, 2 s at most.
        """
        super().stop()

    def _begin(self, grid: Grid) -> Run:
        return _LoopRun(self, grid, self.io_loop or IOLoop.current())


class _LoopRun(Run):
    def __init__(self, reporter: Reporter, grid: Grid, loop: IOLoop) -> None:
        self._reporter, self._grid = reporter, grid
        self._loop: Any = loop
        self._timer: Any = None
        self.pid = os.getpid()
        self._is_stopped = self._is_busy = False
        report = reporter.report
        self._is_async = inspect.iscoroutinefunction(report) or gen.is_coroutine_function(report)
        self._task: asyncio.Future[None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._loop.add_callback(self._tick)

    def request_stop(self) -> None:
        if self._is_stopped:
            return
        self._is_stopped = True
        if self.pid != os.getpid():  # a forked child has no use for the loop of its parent
            return
        if self._timer is not None:
            self._loop.remove_timeout(self._timer)
        if not self._is_async:
            try:
                self._start_thread(self._last_report_in_thread, self._thread)
            except RuntimeError:  # Python 3.12 starts none at the end of the process
                self._last_report_in_thread(self._thread)
        elif self._loop.asyncio_loop.is_running():
            self._loop.add_callback(self._last_report_on_loop)
        elif self._loop.asyncio_loop.is_closed():
            self._reporter._warn("its last report was not made, as the loop is closed")
        else:
            try:
                self._loop.run_sync(self._last_report_on_loop, timeout=STOP_SECONDS)
            except Exception as error:  # it took too long
                self._reporter._failed(error)

    def stop(self) -> None:
        thread = self._thread
        if thread is None or self.pid != os.getpid():
            return
        if not self._loop.asyncio_loop.is_running():
            self._join()
            return
        shutdown.register(self._join, shutdown.Phase.LAST_REPORT)
        if not thread.is_alive():
            shutdown.unregister(self._join)

    def _tick(self) -> None:
        if self._is_stopped:
            return
        missed = self._grid.pass_by(monotonic())  # the first of them is this one
        self._timer = self._loop.call_later(self._grid.wait_seconds, self._tick)
        if missed + self._is_busy:  # the loop was blocked, or the report before is not done
            self._reporter._count(SKIPPED, missed + self._is_busy)
        if self._is_busy:
            return
        self._is_busy = True
        if self._is_async:
            self._task = asyncio.ensure_future(self._report_on_loop())
            return
        try:
            self._start_thread(self._report_in_thread)
        except RuntimeError as error:  # no thread can be started
            self._is_busy = False
            self._reporter._failed(error)

    async def _report_on_loop(self) -> None:
        report: Any = self._reporter.report
        try:
            await report()
        except Exception as error:
            self._reporter._failed(error)
        finally:
            self._is_busy = False

    async def _last_report_on_loop(self) -> None:
        if self._task is not None:
            await self._task
        await self._report_on_loop()
        self._reporter._release()

    def _start_thread(self, target: Callable[..., None], *arguments: Any) -> None:
        name = f"tapes-{type(self._reporter).__name__}"
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        self._thread = thread

    def _report_in_thread(self) -> None:
        try:
            self._reporter.report()
        except BaseException as error:  # SystemExit too
            self._reporter._failed(error)
        finally:
            self._is_busy = False

    def _last_report_in_thread(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join(STOP_SECONDS)
        if before is None or not before.is_alive():
            self._report_in_thread()
            self._reporter._release()
        else:
            self._warn_late()
        shutdown.unregister(self._join)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
            if self._thread.is_alive():
                self._warn_late()

    def _warn_late(self) -> None:
        self._reporter._warn(f"its last report was not done within {STOP_SECONDS:g} s")
