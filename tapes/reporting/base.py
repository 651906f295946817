"""What all reporters share: which registry, and what becomes of a report that fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from tapes.clock import monotonic
from tapes.errors import InvalidArgument, TapesError, safe_text
from tapes.metrics import Counter
from tapes.registry import Registry, default_registry

__all__ = ["FAILED", "SKIPPED", "Reporter"]

R = TypeVar("R", bound="Reporter")

FAILED = "tapes.reports.failed"
"""The counter {reporter} of reports that failed."""
SKIPPED = "tapes.reports.skipped"
"""The counter {reporter} of reports that were left out, as the one before was not done."""

_LOG_SECONDS = 60.0

_log = logging.getLogger("tapes.reporting")


class Reporter:
    """Writes the values of a registry somewhere.

    Args:
        interval: The time between reports; ``None`` for a reporter that answers when it is asked.
        registry: What to report; the default registry if ``None``. An aggregator replaces it by the merged
            view of all workers before it calls `start`.

    Raises:
        InvalidArgument: If the interval is not a positive ``timedelta``, or the registry is none.
    """

    def __init__(self, interval: timedelta | None = None, registry: Registry | None = None) -> None:
        name = type(self).__name__
        if interval is not None and (not isinstance(interval, timedelta) or interval <= timedelta(0)):
            raise InvalidArgument(
                f"the interval of {name}",
                got=interval,
                expected="a positive timedelta: timedelta(seconds=10)",
            )
        if registry is not None and not isinstance(registry, Registry):
            raise InvalidArgument(f"the registry of {name}", got=registry, expected="a Registry, or None")
        self.interval = interval
        self.registry = default_registry if registry is None else registry
        self._quiet_until = 0.0
        self._unsaid = 0

    def report(self) -> None:
        """Write all values once; for subclasses to override. What it raises is counted and logged."""
        raise NotImplementedError(f"{type(self).__name__} has no report()")

    def start(self) -> None:
        """Begin to report; returns at once."""
        raise NotImplementedError(f"{type(self).__name__} has no start()")

    def stop(self) -> None:
        """End it, and release what it holds; nothing if it wasn't started."""
        raise NotImplementedError(f"{type(self).__name__} has no stop()")

    def pause(self) -> None:
        """Give back what only one process can hold, such as a port: nothing needs the reports for now.

        An aggregator calls it when its service has ended, 2 s before it ends itself, so that the next start
        of the service finds the port free. `resume` or `stop` follows. By default it does nothing; a reporter
        that binds something in `start` should override both. It should return at once.
        """

    def resume(self) -> None:
        """Take again what `pause` gave back: another process has joined the service.

        An aggregator calls it again every 0.1 s for as long as it raises.
        """

    def __enter__(self: R) -> R:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _release(self) -> None:
        """Let go of what reports need, after the last one."""

    def _report_now(self, done: Callable[[], None]) -> None:
        """Report beside the schedule, and call ``done`` after it, from any thread; returns at once.

        A reporter without a schedule has nothing to report.
        """
        done()

    def _no_more_reports(self) -> None:
        """Report a last time, without anybody waiting for it; `stop` follows."""

    def _count(self, name: str, n: int = 1) -> None:
        """Add ``n`` to the counter ``name`` {reporter}, which tells of this reporter's troubles."""
        with contextlib.suppress(TapesError):  # if the name belongs to another kind of metric
            self.registry.own(Counter, name, reporter=type(self).__name__).increment(n)

    def _failed(self, error: BaseException) -> None:
        """Count a report that failed, and log it unless something was logged in the last minute."""
        self._count(FAILED)
        expected = isinstance(error, (OSError, TapesError))  # the network's or the service's, and no mistake
        self._warn(f"a report failed ({type(error).__name__}: {safe_text(error)})", traceback=not expected)

    def _warn(self, what: str, *, traceback: bool = False) -> None:
        """Log ``what``, once a minute at most."""
        now = monotonic()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} times in the last minute)" if self._unsaid else ""
        self._quiet_until, self._unsaid = now + _LOG_SECONDS, 0
        with contextlib.suppress(Exception):  # whatever logging is made to do
            _log.warning("tapes: %s: %s%s", type(self).__name__, what, more, exc_info=traceback)
