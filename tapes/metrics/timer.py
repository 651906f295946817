"""Timer: how often and how long."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Callable, NamedTuple, TypeVar

from tapes.ewma import Rates
from tapes.metrics.base import FULL
from tapes.metrics.meter import Ticking
from tapes.naming import Labels
from tapes.sketch import EMPTY, Sketch
from tapes.snapshot import TimerSeries
from tapes.sums import Number

__all__ = ["Timer", "TimerState", "Timing"]

F = TypeVar("F", bound=Callable[..., Any])


class TimerState(NamedTuple):
    """The sketch of all durations in seconds, and the rates of their ends."""

    sketch: Sketch
    rates: Rates

    @staticmethod
    def merge(states: Iterable[TimerState]) -> TimerState:
        """Return the state of one timer that saw all streams."""
        every = list(states)
        return TimerState(
            Sketch.merge(state.sketch for state in every),
            Rates.merge(state.rates for state in every),
        )

    def series(self, labels: Labels, tick: int) -> TimerSeries:
        """Return what a reader sees as of ``tick``."""
        m1, m5, m15 = self.rates.read(tick)
        return TimerSeries(labels, m1, m5, m15, self.sketch.lifetime, self.sketch.recent)


class Timer(Ticking):
    """Keeps the distribution of durations in seconds, and how often they occur.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> with registry.timer("page.render").time():
        ...     pass
        >>> registry.get_stats().page.render["count"]
        1
    """

    kind = "timer"
    __slots__ = ()

    def time(self) -> Timing:
        """Return a context manager, also usable as a decorator, that records how long its block took.

        The duration is recorded when the block ends, also by an exception. As a decorator it takes
        functions and coroutine functions; a coroutine is timed from its first step to its end. Each block
        needs a ``time()`` of its own.
        """
        return Timing(self)

    def update(self, seconds: Number) -> None:
        """Add a duration in seconds, zero or more; a bad one is dropped, counted and logged.

        Cost: a clock read and an append. Never raises, never waits.
        """
        self.record(seconds, self._clock())

    def record(self, seconds: Number, now: float) -> None:
        """Add a duration that ended at ``now`` on this timer's clock, for callers that have just looked."""
        if now >= self._tick_end:
            self._fold(now)
        buffer = self._buffer
        buffer.append(seconds)
        if len(buffer) >= FULL:
            self._fold(now)

    def _initial(self, now: float) -> TimerState:
        self._set_tick(now)
        return TimerState(EMPTY, Rates.started(self._tick))

    def _absorb(self, values: list[Any]) -> TimerState:
        state: Any = self._state
        try:
            if min(values) < 0:
                values = self._sift(values, least=0)
            sketch = state.sketch.fold(values, self._tick) if values else state.sketch
        except Exception:  # whatever a stranger's number raises
            values = self._sift(values, least=0)
            sketch = state.sketch.fold(values, self._tick) if values else state.sketch
        return TimerState(sketch, state.rates.mark(len(values), self._tick))


class Timing:
    """One running measurement, or a decorator that makes one per call; see `Timer.time`."""

    __slots__ = ("_start", "_timer")

    def __init__(self, timer: Timer) -> None:
        self._timer = timer

    def __enter__(self) -> Timing:
        self._start = self._timer._clock()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        timer = self._timer
        now = timer._clock()
        timer.record(now - self._start, now)

    def __call__(self, function: F) -> F:
        """Return ``function`` with every call of it measured."""
        timer = self._timer
        wrapper: Any
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with Timing(timer):
                    return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with Timing(timer):
                    return function(*args, **kwargs)

        timed: F = wrapper
        return timed
