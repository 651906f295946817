"""A call that returns an awaitable or a generator is timed until that has finished."""

import asyncio
import concurrent.futures
import functools
import gc
import inspect
import types
import warnings

import anyio
import pytest
from tornado import gen

import tapes
from tapes.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock(1000.0)


@pytest.fixture
def timer(clock):
    return tapes.Registry(clock=clock).timer("t")


def durations(timer):
    state = timer.collect()
    return state.sketch.count, round(state.sketch.lifetime.sum, 6)


async def work(clock, seconds=3.0):
    await asyncio.sleep(0)
    clock.advance(seconds)
    return "done"


@gen.coroutine
def generator_based(clock):
    result = yield work(clock)
    return result


class View:
    def __init__(self, clock):
        self.clock = clock

    def dispatch(self):
        return self.get()

    async def get(self):
        return await work(self.clock)


class CallableView(View):
    def __call__(self):
        return self.get()


class Awaitable:
    def __init__(self, clock):
        self._clock = clock

    def __await__(self):
        return (yield from work(self._clock).__await__())


def decorated(function):
    def wrapper(*args):
        return function(*args)

    return wrapper


@pytest.mark.parametrize(
    "make",
    [
        lambda clock: View(clock).dispatch,
        CallableView,
        lambda clock: functools.partial(View(clock).dispatch),
        lambda clock: functools.partial(work, clock),
        lambda clock: lambda: work(clock),
        lambda clock: decorated(functools.partial(work, clock)),
        lambda clock: functools.partial(generator_based, clock),
        lambda clock: lambda: asyncio.ensure_future(work(clock)),
        lambda clock: lambda: Awaitable(clock),
        lambda clock: lambda: asyncio.gather(work(clock)),
    ],
)
def test_a_call_is_timed_until_the_awaitable_it_returns_has_finished(clock, timer, make):
    """A decorated call of any form that returns an awaitable is timed until the awaitable has finished."""

    async def main():
        result = await timer.time()(make(clock))()
        await asyncio.sleep(0)  # futures run their callbacks in the loop's next round
        return result

    assert asyncio.run(main()) in ("done", ["done"])
    assert durations(timer) == (1, 3.0)


def test_the_time_of_the_call_itself_counts_and_the_time_before_the_await_does_not(clock, timer):
    """The call and the awaiting are timed, but not the time between them."""

    @timer.time()
    def prepare():
        clock.advance(2.0)
        return work(clock)

    async def main():
        coroutine = prepare()
        clock.advance(100.0)
        await coroutine

    asyncio.run(main())
    assert durations(timer) == (1, 5.0)


def test_a_returned_coroutine_stays_a_native_one_with_its_name(clock, timer):
    """A returned coroutine is still a native coroutine with its own name."""
    coroutine = timer.time()(View(clock).dispatch)()
    assert inspect.iscoroutine(coroutine)
    assert coroutine.__qualname__ == "View.get"
    coroutine.close()


def test_anyio_starts_a_timed_callable_that_returns_a_coroutine(clock, timer):
    """anyio's task groups accept a timed callable that returns a coroutine."""

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(timer.time()(View(clock).dispatch))

    anyio.run(main)
    assert durations(timer) == (1, 3.0)


def test_an_exception_in_the_coroutine_is_timed_and_raised(clock, timer):
    """An exception in a returned coroutine is raised, and the call is timed."""

    async def fail():
        clock.advance(1.0)
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(timer.time()(lambda: fail())())
    assert durations(timer) == (1, 1.0)


def test_a_coroutine_that_is_closed_before_its_start_gives_no_warning(clock, timer):
    """A returned coroutine that is closed before its start gives no warning and is not timed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timer.time()(View(clock).dispatch)().close()
        gc.collect()
    assert caught == []
    assert durations(timer) == (0, 0.0)


def test_a_coroutine_that_is_never_awaited_gives_one_warning_with_its_own_name(clock, timer):
    """A returned coroutine that is never awaited gives Python's warning once, with its own name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timer.time()(View(clock).dispatch)()
        gc.collect()
    assert [str(warning.message) for warning in caught] == ["coroutine 'View.get' was never awaited"]


def test_a_future_of_a_thread_is_returned_as_it_is_and_timed_until_it_is_done(clock, timer):
    """A returned concurrent future is returned as it is, and timed until it is done."""
    future = concurrent.futures.Future()
    assert timer.time()(lambda: future)() is future
    assert durations(timer) == (0, 0.0)
    clock.advance(4.0)
    future.set_result(1)
    assert durations(timer) == (1, 4.0)


def test_a_returned_generator_is_timed_to_its_end(clock, timer):
    """A call that returns a generator is timed until the generator is exhausted."""

    def rows():
        for row in range(2):
            clock.advance(1.0)
            yield row

    generator = timer.time()(lambda: rows())()
    assert inspect.isgenerator(generator)
    assert list(generator) == [0, 1]
    assert durations(timer) == (1, 2.0)


def test_a_returned_asynchronous_generator_is_timed_to_its_end(clock, timer):
    """A call that returns an asynchronous generator is timed until the generator is exhausted."""

    async def rows():
        for row in range(2):
            clock.advance(1.0)
            yield row

    async def main():
        return [row async for row in timer.time()(lambda: rows())()]

    assert asyncio.run(main()) == [0, 1]
    assert durations(timer) == (1, 2.0)


class Deferred:
    """Can be awaited, and has methods of its own."""

    def add_callback(self, callback):
        callback(1)

    def __await__(self):
        yield


class OpensToo:
    """Can be awaited, and is a context manager, as `aiofiles.open` is."""

    def __await__(self):
        yield

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass


class Iterable:
    def __await__(self):
        yield

    def __iter__(self):
        return iter(())


class WithAttribute:
    def __init__(self):
        self.request_id = 3

    def __await__(self):
        yield


class StartsWork:
    """Its callbacks make it poll."""

    def add_done_callback(self, callback):
        raise AssertionError


def started():
    def receive():
        while True:
            yield

    generator = receive()
    next(generator)
    return generator


class EveryAttribute:
    def __getattr__(self, name):
        return lambda *args: None


class NoFuture:
    def add_done_callback(self, one, two):
        raise AssertionError


@pytest.mark.parametrize(
    "result",
    [
        None,
        1,
        "x",
        object(),
        Deferred(),
        EveryAttribute(),
        NoFuture(),
        OpensToo(),
        Iterable(),
        WithAttribute(),
        StartsWork(),
        started(),
        [1],
        iter([1]),
    ],
)
def test_any_other_result_is_returned_as_it_is_and_the_call_is_timed(clock, timer, result):
    """Any other result is returned as it is, also one with unusual methods, and the call alone is timed."""

    @timer.time()
    def call():
        clock.advance(1.0)
        return result

    assert call() is result
    assert durations(timer) == (1, 1.0)


def test_async_with_times_its_block(clock, timer):
    """``async with timer.time()`` times its block, also if the block raises."""

    async def main():
        async with timer.time():
            await work(clock)
        async with timer.time():
            clock.advance(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    assert durations(timer) == (2, 4.0)


def test_a_coroutine_made_of_a_generator_stays_one(clock, timer):
    """A coroutine made by types.coroutine can be awaited when it is timed, and is timed to its end."""

    @types.coroutine
    def generator_based():
        clock.advance(2.0)
        yield from asyncio.sleep(0).__await__()
        return "done"

    async def main():
        return [
            await timer.time()(generator_based)(),
            await timer.time()(functools.partial(generator_based))(),
            await timer.time()(lambda: generator_based())(),
        ]

    assert asyncio.run(main()) == ["done"] * 3
    assert durations(timer) == (3, 6.0)
