"""What all reporters share: a registry, and what happens when a report fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from tapes.clock import monotonic
from tapes.errors import InvalidArgument, TapesError, safe_text
from tapes.metrics import Counter
from tapes.registry import Registry, default_registry

R = TypeVar("R", bound="Reporter")

FAILED = "tapes.reports.failed"
"""The counter {reporter} of reports that failed."""
SKIPPED = "tapes.reports.skipped"
"""The counter {reporter} of reports that were skipped because the one before was not done."""

_LOG_SECONDS = 60.0
"""Minimum seconds between two warnings of a reporter."""

_log = logging.getLogger("tapes.reporting")


class Reporter:
    """Writes the values of a registry somewhere.

    Args:
        interval: The time between reports; ``None`` for a reporter that answers requests.
        registry: What to report; the default registry if ``None``. An aggregator replaces it by the merged
            view of all workers before it calls `start`.

    Raises:
        InvalidArgument: If the interval is not a positive ``timedelta``, or ``registry`` is not a registry.
    """

    def __init__(self, interval: timedelta | None = None, registry: Registry | None = None) -> None:
        name = type(self).__name__
        if interval is not None and (not isinstance(interval, timedelta) or interval <= timedelta(0)):
            expected = "a positive timedelta: timedelta(seconds=10)"
            raise InvalidArgument(f"the interval of {name}", got=interval, expected=expected)
        if registry is not None and not isinstance(registry, Registry):
            raise InvalidArgument(f"the registry of {name}", got=registry, expected="a Registry, or None")
        self.interval = interval
        self.registry = default_registry if registry is None else registry
        self._warn_again_at = 0.0
        self._suppressed = 0

    def report(self) -> None:
        """Write all values once; for subclasses to override. What it raises is counted and logged."""
        raise NotImplementedError(f"{type(self).__name__} has no report()")

    def start(self) -> None:
        """Start reporting; returns at once."""
        raise NotImplementedError(f"{type(self).__name__} has no start()")

    def stop(self) -> None:
        """Stop reporting and release all resources; does nothing if it was not started."""
        raise NotImplementedError(f"{type(self).__name__} has no stop()")

    def pause(self) -> None:
        """Release what only one process can hold, such as a port.

        An aggregator calls it when its service has exited, 2 s before it exits itself. So the next start of
        the service finds the port free. `resume` or `stop` follows. By default it does nothing; a reporter
        that binds something in `start` should override both. It should return at once.
        """

    def resume(self) -> None:
        """Acquire again what `pause` released: another process has joined the service.

        An aggregator calls it again every 0.1 s while it raises.
        """

    def __enter__(self: R) -> R:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _release(self) -> None:
        """Release what reports need; called after the last one."""

    def _report_now(self, done: Callable[[], None]) -> None:
        """Report now, if it has a schedule, and then call ``done`` from any thread; returns at once."""
        done()

    def _no_more_reports(self) -> None:
        """Start the last report; returns at once. `stop` follows and waits for it."""

    def _count(self, name: str, n: int = 1) -> None:
        """Add ``n`` to the counter ``name`` {reporter}, which counts problems of this reporter."""
        with contextlib.suppress(TapesError):  # if the name belongs to another kind of metric
            self.registry.own(Counter, name, reporter=type(self).__name__).increment(n)

    def _failed(self, error: BaseException) -> None:
        """Count a report that failed, and log it, once a minute at most."""
        self._count(FAILED)
        expected = isinstance(error, (OSError, TapesError))  # of the network or the service; no mistake
        self._warn(f"a report failed ({type(error).__name__}: {safe_text(error)})", traceback=not expected)

    def _warn(self, what: str, *, traceback: bool = False) -> None:
        """Log ``what``, once a minute at most, with the number of warnings that were not logged."""
        now = monotonic()
        if now < self._warn_again_at:
            self._suppressed += 1
            return
        more = f" (and {self._suppressed} times in the last minute)" if self._suppressed else ""
        self._warn_again_at, self._suppressed = now + _LOG_SECONDS, 0
        with contextlib.suppress(Exception):  # a failing logging handler must not end the schedule
            _log.warning("tapes: %s: %s%s", type(self).__name__, what, more, exc_info=traceback)
