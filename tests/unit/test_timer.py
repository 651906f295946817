"""Timers as decorators: what is timed, from where to where, and what stays as it was."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect

import pytest

import tapes


def durations(registry):
    return registry.snapshot().get("t").lifetime.bins()


def test_a_generator_is_timed_to_its_exhaustion(registry, clock):
    """A generator is timed from its first value to its end, including what the consumer does in between."""

    @registry.timer("t").time()
    def numbers():
        clock.advance(1)
        received = yield "first"
        clock.advance(2)
        yield received
        return "done"

    generator = numbers()
    clock.advance(100)  # not started yet
    assert next(generator) == "first"
    clock.advance(4)
    assert generator.send("sent") == "sent"
    assert durations(registry) == []
    with pytest.raises(StopIteration) as stopped:
        next(generator)
    assert stopped.value.value == "done"
    assert durations(registry) == [(7.0, 1)]


@pytest.mark.parametrize("end", ["close", "throw", "forget"])
def test_a_generator_that_is_given_up_is_timed_to_its_end(registry, clock, end):
    """Closed, hit by an exception, or dropped: recorded once, and its own clean-up runs."""
    cleaned = []

    @registry.timer("t").time()
    def numbers():
        try:
            while True:
                yield
        finally:
            cleaned.append(True)

    generator = numbers()
    next(generator)
    clock.advance(3)
    if end == "close":
        generator.close()
    elif end == "throw":
        with pytest.raises(KeyError):
            generator.throw(KeyError())
    else:
        generator = None
        gc.collect()
    assert durations(registry) == [(3.0, 1)]
    assert cleaned == [True]


def test_a_generator_that_was_never_started_is_not_recorded(registry):
    """A generator that was never started is not recorded, as nothing ran."""

    @registry.timer("t").time()
    def numbers():
        yield 1

    numbers().close()
    assert durations(registry) == []


def test_an_asynchronous_generator_is_timed_to_its_exhaustion(registry, clock):
    """Values, what is sent and what is thrown go through; it records once."""

    @registry.timer("t").time()
    async def numbers():
        clock.advance(1)
        try:
            received = yield "first"
        except KeyError:
            received = "caught"
        await asyncio.sleep(0)
        clock.advance(2)
        yield received

    async def consume(*steps):
        generator = numbers()
        seen = [await generator.__anext__()]
        for step in steps:
            seen.append(await step(generator))
        seen += [value async for value in generator]
        return seen

    assert asyncio.run(consume(lambda g: g.asend("sent"))) == ["first", "sent"]
    assert asyncio.run(consume(lambda g: g.athrow(KeyError()))) == ["first", "caught"]
    assert asyncio.run(consume()) == ["first", None]
    assert durations(registry) == [(3.0, 3)]


def test_an_asynchronous_generator_that_is_closed_or_cancelled_is_timed_to_its_end(registry, clock):
    """The time of an asynchronous generator includes its clean-up after a close or a cancellation."""
    cleaned = []
    waiting = []

    @registry.timer("t").time()
    async def numbers():
        try:
            yield 1
            waiting[0].set()
            await asyncio.sleep(3600)
        finally:
            clock.advance(2)
            cleaned.append(True)

    async def close():
        generator = numbers()
        await generator.__anext__()
        await generator.aclose()

    async def cancel():
        async def consume():
            async for _ in numbers():
                pass

        waiting.append(asyncio.Event())
        task = asyncio.ensure_future(consume())
        await waiting[0].wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(close())
    asyncio.run(cancel())
    assert cleaned == [True, True]
    assert durations(registry) == [(2.0, 2)]


def test_an_exception_of_an_asynchronous_generator_goes_through(registry):
    """An exception of an asynchronous generator passes through, and the duration is recorded."""

    @registry.timer("t").time()
    async def numbers():
        yield 1
        raise LookupError("out of numbers")

    async def consume():
        return [number async for number in numbers()]

    with pytest.raises(LookupError, match="out of numbers"):
        asyncio.run(consume())
    assert registry.snapshot().get("t").count == 1


def test_what_is_decorated_stays_what_it_is(registry):
    """A decorated function keeps its type for frameworks, its name, signature and documentation."""
    time = registry.timer("t").time

    def plain(a, *, b=2):
        "Plain."

    async def coroutine():
        pass

    def generator():
        yield

    async def async_generator():
        yield

    kinds = {
        plain: inspect.isfunction, coroutine: inspect.iscoroutinefunction,
        generator: inspect.isgeneratorfunction, async_generator: inspect.isasyncgenfunction,
    }  # fmt: skip
    for function, kind in kinds.items():
        timed = time()(function)
        assert kind(timed)
        assert timed.__name__ == function.__name__
        assert timed.__wrapped__ is function
        assert inspect.signature(timed) == inspect.signature(function)
    assert time()(plain).__doc__ == "Plain."


def test_methods_and_partials_can_be_decorated(registry, clock):
    """Methods and partials can be decorated below @staticmethod and @classmethod; above is an error."""
    time = registry.timer("t").time

    class Work:
        @time()
        def method(self, seconds):
            clock.advance(seconds)
            return self

        @staticmethod
        @time()
        def static(seconds):
            clock.advance(seconds)

        @classmethod
        @time()
        def of_class(cls, seconds):
            clock.advance(seconds)
            return cls

    work = Work()
    assert work.method(1) is work
    assert Work.of_class(2) is Work
    Work.static(4)
    time()(functools.partial(Work.static, 8))()
    assert durations(registry) == [(1.0, 1), (2.0, 1), (4.0, 1), (8.0, 2)]  # both timers of the partial
    with pytest.raises(tapes.TapesError, match="@staticmethod and @classmethod above"):
        time()(classmethod(lambda cls: None))


def test_a_decorator_can_be_kept_and_used_twice(registry, clock):
    """A decorator that is used twice makes a measurement of its own for every call."""
    timed = registry.timer("t").time()

    @timed
    def outer():
        clock.advance(1)
        inner()

    @timed
    def inner():
        clock.advance(2)

    outer()
    assert durations(registry) == [(2.0, 1), (3.0, 1)]


def test_concurrent_calls_do_not_share_a_start(registry, clock):
    """Two coroutines in turns: each is timed from its own first step."""
    timer = registry.timer("t")

    @timer.time()
    async def wait(turns):
        for _ in range(turns):
            clock.advance(1)
            await asyncio.sleep(0)

    async def both():
        await asyncio.gather(wait(1), wait(3))

    asyncio.run(both())
    assert durations(registry) == [(2.0, 1), (3.0, 1)]


def test_a_clock_that_goes_back_makes_a_bad_value_and_no_exception(registry):
    """A negative duration is dropped and counted; the block's result is untouched."""
    timer = registry.timer("t")
    with timer.time() as timing:
        timing._start += 5
    assert durations(registry) == []
    assert registry.get_stats().tapes.rejected.value == 1


def test_a_callable_object_with_a_coroutine_is_timed_to_its_end(registry, clock):
    """A callable object that returns a coroutine is timed to the end of the coroutine."""

    class Handler:
        async def __call__(self):
            await asyncio.sleep(0)
            clock.advance(2)

    handler = registry.timer("t").time()(Handler())
    asyncio.run(handler())
    assert durations(registry) == [(2.0, 1)]
