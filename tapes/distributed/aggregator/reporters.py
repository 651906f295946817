"""The reporters of an aggregator, from their start to their end.

Each reporter is in one of three states:

    waiting   Its port is in use, as the aggregator of the service's last run keeps it for a moment. `start`
              is tried at every look, for longer than such an aggregator can live; then its error is raised.
    started   It reports.
    paused    The aggregator is idle (see `.lifetime`), and the next run of the service may need the port.
              `resume` is tried at every look once the aggregator is not idle any more.

The aggregator's loop calls everything here, which returns at once; reports are made by the reporters'
threads.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Sequence

from tapes.errors import AddressInUse, safe_text
from tapes.registry import Registry
from tapes.reporting import Reporter

START_SECONDS = 4.0
"""Maximum seconds to wait for a port or an address that is in use; an idle aggregator lives for 2 s."""
_REPORT_SECONDS = 0.5
"""Maximum seconds that a demand waits for reports; a worker waits 1 s for the reply to its goodbye."""

_log = logging.getLogger("tapes.distributed")


class Demand:
    """A demand for a report of every reporter: when it is over, and the reports once they are under way."""

    def __init__(self, now: float) -> None:
        self.ends = now + _REPORT_SECONDS
        self.reported: list[threading.Event] | None = None


class Reports:
    """Starts and stops the reporters; ``wake`` wakes the aggregator's loop when one has met a demand."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: list[Reporter] = []
        self._started: list[Reporter] = []
        self._paused: list[Reporter] = []
        self._begun = False
        self._gives_up = 0.0

    def begin(self, reporters: Sequence[Reporter], registry: Registry, now: float) -> bool:
        """Start ``reporters`` with ``registry``; return and raise as `have_started` does."""
        for reporter in reporters:
            reporter.registry = registry
        self._waiting = list(reporters)
        self._begun, self._gives_up = True, now + START_SECONDS
        return self.have_started(now)

    def have_started(self, now: float) -> bool:
        """Try to start those that have not started; return whether all have.

        Raises what `start` raised, if a port was in use for too long, or for any other reason.
        """
        for reporter in list(self._waiting):
            try:
                reporter.start()
            except Exception as error:
                if not _is_in_use(error) or now >= self._gives_up:
                    raise
            else:
                self._waiting.remove(reporter)
                self._started.append(reporter)
        return not self._waiting

    def demand(self, now: float) -> Demand:
        """Have all reporters report; return a demand that is over when they have."""
        demand = Demand(now)
        self.is_met(demand, now)
        return demand

    def is_met(self, demand: Demand, now: float) -> bool:
        """Return whether all have reported, or took too long; they begin once they have started."""
        if self._begun and demand.reported is None:
            demand.reported = list(map(self._report, self._started))
        reported = demand.reported
        return now >= demand.ends or (reported is not None and all(one.is_set() for one in reported))

    def _report(self, reporter: Reporter) -> threading.Event:
        def note() -> None:
            reported.set()
            self._wake()

        reported = threading.Event()
        reporter._report_now(note)
        return reported

    def pause(self) -> None:
        for reporter in self._started:
            if reporter not in self._paused:
                self._paused.append(reporter)
                try:
                    reporter.pause()
                except Exception as error:
                    reporter._warn(f"it failed to pause ({safe_text(error)})")

    def resume(self) -> None:
        """Resume the paused reporters; the next call tries those again that can't resume yet."""
        for reporter in self._paused.copy():
            try:
                reporter.resume()
            except Exception as error:
                reporter._warn(f"it can't resume yet ({safe_text(error)})")
            else:
                self._paused.remove(reporter)

    def stop(self) -> None:
        """Have all reporters report a last time, all at once, and wait for them."""
        for end in (*(r._no_more_reports for r in self._started), *(r.stop for r in self._started)):
            try:
                end()
            except Exception:
                _log.exception("tapes: a reporter failed to stop")


def _is_in_use(error: Exception) -> bool:
    return isinstance(error, AddressInUse) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE)
