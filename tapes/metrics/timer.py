"""Timer: how often and how long."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Callable, NamedTuple, TypeVar, cast

from tapes.errors import InvalidArgument
from tapes.ewma import Rates
from tapes.metrics.base import FULL
from tapes.metrics.meter import Ticking
from tapes.metrics.origin import NOWHERE, Origin
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
    origin: Origin = NOWHERE

    @staticmethod
    def merge(states: Iterable[TimerState]) -> TimerState:
        """Return the state of one timer that saw all streams."""
        every = list(states)
        return TimerState(
            Sketch.merge(state.sketch for state in every),
            Rates.merge(state.rates for state in every),
            Origin.merge(state.origin for state in every),
        )

    @property
    def is_empty(self) -> bool:
        """Whether no value was recorded."""
        return self.sketch.count == 0

    @property
    def counted(self) -> Number:
        """How many durations."""
        return self.sketch.count

    def series(self, labels: Labels, tick: int) -> TimerSeries:
        """Return what a reader sees as of ``tick``."""
        m1, m5, m15 = self.rates.read(tick)
        return TimerSeries(labels, m1, m5, m15, self.sketch.lifetime, self.sketch.recent, self.origin.created)


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
    _least = 0.0
    __slots__ = ()

    def time(self) -> Timing:
        """Return a context manager, also usable as a decorator, that records how long its block took.

        The duration is recorded when the block ends, also by an exception. A decorated function is timed
        per call, nested and recursive calls each on their own. Coroutines, generators and asynchronous
        generators are timed from their first step to their end: exhaustion, ``close()``, an exception. Each
        block needs a ``time()`` of its own.
        """
        timing = Timing()
        timing._timer = self
        return timing

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
        return TimerState(EMPTY, Rates.started(self._tick), Origin.now())

    def _is_settled(self) -> bool:
        settled: bool = self._state.sketch.is_settled
        return settled

    def _settled(self) -> TimerState:
        state: TimerState = self._state
        if state.sketch.is_settled:
            return state
        return TimerState(state.sketch.settled(), state.rates, state.origin)

    def _absorb(self, values: list[Any]) -> TimerState:
        state = self._state
        sketch = state.sketch.fold(values, self._tick, self._least)
        return TimerState(sketch, state.rates.mark(len(values), self._tick), state.origin)


class Timing:
    """One running measurement, or a decorator that makes one per call; see `Timer.time`."""

    # Made by Timer.time() alone, which sets _timer: without an __init__ that takes a third of the time.
    __slots__ = ("_start", "_timer")
    _timer: Timer
    _start: float

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
        # What follows is Timer.record(); a call of it would cost as much as all of it.
        if now >= timer._tick_end:
            timer._fold(now)
        buffer = timer._buffer
        buffer.append(now - self._start)
        if len(buffer) >= FULL:
            timer._fold(now)

    def __call__(self, function: F) -> F:
        """Return ``function`` with every call of it measured, from its first step to its last."""
        if not callable(function):
            raise InvalidArgument(
                "time() as a decorator",
                got=function,
                expected="a function",
                remedy="put @staticmethod and @classmethod above it",
            )
        call = type(function).__call__  # of an object that is no function
        wrap = next((wrap for is_one, wrap in _WRAPS if is_one(function) or is_one(call)), _timed_function)
        return cast("F", functools.wraps(function)(wrap(function, self._timer)))


def _timed_function(function: Callable[..., Any], timer: Timer) -> Callable[..., Any]:
    clock, record = timer._clock, timer.record

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return function(*args, **kwargs)
        finally:
            now = clock()
            record(now - start, now)

    return wrapper


def _timed_coroutine(function: Callable[..., Any], timer: Timer) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with timer.time():
            return await function(*args, **kwargs)

    return wrapper


def _timed_generator(function: Callable[..., Any], timer: Timer) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with timer.time():
            return (yield from function(*args, **kwargs))

    return wrapper


def _timed_async_generator(function: Callable[..., Any], timer: Timer) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with timer.time():
            generator = function(*args, **kwargs)
            step = generator.__anext__()
            while True:
                try:
                    value = await step
                except StopAsyncIteration:
                    return
                try:
                    sent = yield value
                except GeneratorExit:
                    await generator.aclose()
                    raise
                except BaseException as error:  # whatever the consumer throws is the generator's to handle
                    step = generator.athrow(error)
                else:
                    step = generator.asend(sent)

    return wrapper


_WRAPS: tuple[tuple[Callable[[Any], bool], Callable[..., Callable[..., Any]]], ...] = (
    (inspect.iscoroutinefunction, _timed_coroutine),
    (inspect.isasyncgenfunction, _timed_async_generator),
    (inspect.isgeneratorfunction, _timed_generator),
)
