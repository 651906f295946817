"""Timing: how long a block or a call takes, from its start to its end.

A call ends when its work ends, which may be after it returns. A call that returns a coroutine, a generator, a
future or another awaitable is timed until that has ended. `functools.partial`, class-based views, decorators
and `tornado.gen.coroutine` return such objects from ordinary functions, so the result decides, not the
function. The result stays usable for all that callers do with it:

* A coroutine, or a generator that has not started, is wrapped in another one of its type.
* A future of asyncio, Tornado or `concurrent.futures` is returned as it is, with a callback added to it.
* An object that can only be awaited is wrapped in another one. One that has any other method or attribute is
  returned as it is, and only the call is timed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Generator
from types import AsyncGeneratorType, CoroutineType, GeneratorType, TracebackType
from typing import Any, TypeVar, cast

from tapes.errors import InvalidArgument
from tapes.metrics.folding import FULL

_Timer = Any  # tapes.metrics.timer, which imports this module
F = TypeVar("F", bound=Callable[..., Any])
_Times = Callable[[], "Timing"]
_Rest = Callable[[Any, _Timer, float], Any]
"""Takes the result of a call, the timer and the seconds that the call took; returns what the caller gets."""


class Timing:
    """One running measurement, or a decorator that makes one per call; see `Timer.time`."""

    # Made by Timer.time() alone, which sets _timer: without an __init__ that takes a third of the time.
    __slots__ = ("_start", "_timer")
    _timer: _Timer
    _start: float

    def __enter__(self) -> Timing:
        self._start = self._timer._clock()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        timer = self._timer
        now = timer._clock()
        # What follows is Timer._record(); a call of it would cost as much as all of it.
        if now >= timer._tick_end:
            timer._fold(now)
        buffer = timer._buffer
        buffer.append(now - self._start)
        if len(buffer) >= FULL:
            timer._fold(now)

    async def __aenter__(self) -> Timing:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)

    def __call__(self, function: F) -> F:
        """Return ``function`` with every call of it measured, from its first step to its last."""
        if not callable(function):
            raise InvalidArgument(
                "time() as a decorator",
                got=function,
                expected="a function",
                remedy="put @staticmethod and @classmethod above it",
            )
        call = type(function).__call__  # of an object that is not a function
        timer = self._timer
        for is_one, wrap in _WRAPS:
            if is_one(function) or is_one(call):
                return cast("F", functools.wraps(function)(wrap(function, timer.time)))
        return cast("F", functools.wraps(function)(_timed_function(function, timer)))


class _Resumed(Timing):
    """A measurement that continues after ``_spent`` seconds."""

    __slots__ = ("_spent",)
    _spent: float

    def __enter__(self) -> Timing:
        self._start = self._timer._clock() - self._spent
        return self


def _resumed(timer: _Timer, spent: float) -> Timing:
    timing = _Resumed()
    timing._timer, timing._spent = timer, spent
    return timing


def _timed_function(function: Callable[..., Any], timer: _Timer) -> Callable[..., Any]:
    clock, record = timer._clock, timer._record

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        rest = None
        try:
            result = function(*args, **kwargs)
            if type(result) not in _ENDED:
                rest = _rest_of(type(result))
        finally:
            if rest is None:
                now = clock()
                record(now - start, now)
        return result if rest is None else rest(result, timer, clock() - start)

    return wrapper


def _timed_coroutine(function: Callable[..., Any], time: _Times) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with time():
            return await function(*args, **kwargs)

    return wrapper


def _timed_generator(function: Callable[..., Any], time: _Times) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with time():
            return (yield from function(*args, **kwargs))

    original = function
    while isinstance(original, functools.partial):
        original = original.func
    is_coroutine = getattr(original, "__code__", wrapper.__code__).co_flags & _ITERABLE
    return types.coroutine(wrapper) if is_coroutine else wrapper


def _timed_async_generator(function: Callable[..., Any], time: _Times) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with time():
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
                except BaseException as error:  # the generator handles what the consumer throws
                    step = generator.athrow(error)
                else:
                    step = generator.asend(sent)

    return wrapper


_WRAPS: tuple[tuple[Callable[[Any], bool], Callable[..., Callable[..., Any]]], ...] = (
    (inspect.iscoroutinefunction, _timed_coroutine),
    (inspect.isasyncgenfunction, _timed_async_generator),
    (inspect.isgeneratorfunction, _timed_generator),
)

_ENDED = frozenset({type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset})
"""Types of results that show that a call has ended; most calls need no further check."""


def _rest_of(result_type: type) -> _Rest | None:
    """Return what times the work that continues after a call; ``None`` if the call has ended.

    The type decides: a mock, or an object that creates attributes on access, has every attribute.
    """
    if issubclass(result_type, CoroutineType):
        return _rest_of_coroutine
    if issubclass(result_type, GeneratorType):
        return _rest_of_generator
    if issubclass(result_type, AsyncGeneratorType):
        return _rest_of_async_generator
    if hasattr(result_type, "_asyncio_future_blocking") or issubclass(result_type, _futures_of_threads()):
        return _rest_of_future
    if hasattr(result_type, "__await__") and _can_only_be_awaited(result_type):
        return _rest_of_awaitable
    return None


def _futures_of_threads() -> tuple[type, ...]:
    module: Any = sys.modules.get("concurrent.futures")
    return () if module is None else (module.Future,)


def _can_only_be_awaited(result_type: type) -> bool:
    """Return whether objects of a type have no methods except ``__await__`` and private ones."""
    special = {name for name in dir(result_type) if name.startswith("__") and name.endswith("__")}
    public = [name for name in dir(result_type) if not name.startswith("_")]
    return not public and special <= _OF_EVERY_AWAITABLE


class _OnlyAwaitable:
    __slots__ = ("__dict__", "__weakref__")

    def __await__(self) -> Generator[Any, Any, Any]:
        yield


_ITERABLE = inspect.CO_ITERABLE_COROUTINE
_OF_EVERY_AWAITABLE = {
    *dir(_OnlyAwaitable), "__annotations__", "__del__", "__firstlineno__", "__static_attributes__",
    "__orig_bases__", "__parameters__", "__class_getitem__", "__annotate__", "__annotate_func__",
    "__annotations_cache__",
}  # fmt: skip
"""Special names of an object that can only be awaited."""


class _Owned:
    """A coroutine that is closed with its wrapper: if neither was awaited, only the wrapper warns."""

    __slots__ = ("coroutine",)

    def __init__(self, coroutine: Any) -> None:
        self.coroutine = coroutine

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.coroutine.close()


def _rest_of_coroutine(result: Any, timer: _Timer, spent: float) -> Any:
    async def rest(owned: _Owned) -> Any:
        with _resumed(timer, spent):
            return await owned.coroutine

    return _named(rest(_Owned(result)), result)


def _rest_of_generator(result: Any, timer: _Timer, spent: float) -> Any:
    if inspect.getgeneratorstate(result) != inspect.GEN_CREATED:
        timer.update(spent)
        return result
    wrapper = _timed_generator(lambda: result, lambda: _resumed(timer, spent))
    if result.gi_code.co_flags & _ITERABLE:
        wrapper = types.coroutine(wrapper)
    return _named(wrapper(), result)


def _rest_of_async_generator(result: Any, timer: _Timer, spent: float) -> Any:
    return _named(_timed_async_generator(lambda: result, lambda: _resumed(timer, spent))(), result)


def _named(wrapper: Any, result: Any) -> Any:
    wrapper.__name__, wrapper.__qualname__ = result.__name__, result.__qualname__
    return wrapper


def _rest_of_future(result: Any, timer: _Timer, spent: float) -> Any:
    start = timer._clock() - spent

    def done(future: Any) -> None:
        now = timer._clock()
        timer._record(now - start, now)

    try:
        result.add_done_callback(done)
    except Exception:  # it is not a future after all: the call has ended
        timer.update(spent)
    return result


class _TimedAwaitable:
    """An awaitable whose every ``await`` is timed."""

    __slots__ = ("_awaitable", "_spent", "_timer")

    def __init__(self, awaitable: Any, timer: _Timer, spent: float) -> None:
        self._awaitable, self._timer, self._spent = awaitable, timer, spent

    def __await__(self) -> Generator[Any, Any, Any]:
        with _resumed(self._timer, self._spent):
            return (yield from self._awaitable.__await__())


def _rest_of_awaitable(result: Any, timer: _Timer, spent: float) -> Any:
    if any(not name.startswith("_") for name in getattr(result, "__dict__", ())):
        timer.update(spent)
        return result
    return _TimedAwaitable(result, timer, spent)
