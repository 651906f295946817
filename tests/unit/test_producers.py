"""The producers of gauges: none holds up another one or a read, whatever it does."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading
import time

import pytest

import tapes
from tapes.distributed.worker.gauge_producers import Producers
from tapes.errors import BadValue
from tapes.testing import strict
from tests.processes import wait_for


def test_a_read_waits_for_a_producer_that_was_made_while_another_one_ran():
    """The round that runs just then does not know it."""
    registry = tapes.Registry()
    producers = Producers(registry)
    runs, goes_on, was_read = threading.Event(), threading.Event(), threading.Event()
    registry.gauge("first", lambda: (runs.set(), goes_on.wait(10), 1)[-1])
    producers.ensure_running()
    assert runs.wait(10)
    newest = registry.gauge("newest", lambda: (was_read.wait(0.1), 2)[-1])
    values = []

    def read():
        producers.await_first()
        values.append(newest.collect().value)
        was_read.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(lambda: not producers._wake.locked(), "the read asked for another round")
        goes_on.set()
        reader.join()
        assert values == [2]
    finally:
        assert producers.stop(10)


class Exits(BaseException):
    pass


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit, Exits, RuntimeError]
)
def test_whatever_a_producer_raises_the_others_are_read(registry, caplog, error):
    def fails():
        raise error("gone")

    for name in "adgjm":
        registry.gauge(name, lambda: 1)
        registry.gauge(name + "x", fails)
    snapshot = registry.snapshot()
    assert [snapshot.get(name).value for name in "adgjm"] == [1] * 5
    assert snapshot.series("ax") == ()
    assert registry.own(tapes.Counter, "tapes.rejected").collect().counted == 5
    assert f"its producer failed: {error.__name__}('gone')" in caplog.text


@pytest.fixture
def hang():
    """A producer that hangs until the test ends, and returns how often it was run."""
    goes_on = threading.Event()
    runs = []

    def producer():
        runs.append(1)
        goes_on.wait(60)
        return len(runs)

    producer.runs, producer.goes_on = runs, goes_on
    yield producer
    goes_on.set()


def test_a_producer_that_hangs_holds_up_one_read_for_a_second_and_no_other_producer(registry, caplog, hang):
    registry.gauge("a", lambda: 1)
    registry.gauge("b", hang)
    registry.gauge("c", lambda: 2)
    for _ in range(3):
        snapshot = registry.snapshot()
        assert (snapshot.get("a").value, snapshot.get("c").value, snapshot.series("b")) == (1, 2, ())
    assert len(hang.runs) == 1
    assert registry.own(tapes.Counter, "tapes.rejected").collect().counted == 1
    assert "its producer has not returned within 1 s" in caplog.text
    hang.goes_on.set()
    wait_for(lambda: registry.snapshot().series("b"), "the producer is run again")


def test_several_producers_that_hang_hold_up_one_read_together(registry, hang):
    for number in range(6):
        registry.gauge(f"hangs.{number}", hang)
        registry.gauge(f"works.{number}", lambda: 1)
    start = time.monotonic()
    works = registry.get_stats().works
    assert time.monotonic() - start < 5  # one after the other they would take 6 s
    assert len(works) == 6


def test_the_last_value_of_a_producer_that_hangs_stays_for_ten_seconds(registry, clock, hang):
    answers = [7]
    registry.gauge("g", lambda: answers.pop() if answers else hang())
    assert registry.get_stats().g.value == 7
    assert registry.get_stats().g.value == 7
    clock.advance(9)
    assert registry.get_stats().g.value == 7
    clock.advance(2)
    assert registry.snapshot().series("g") == ()


def test_a_new_producer_replaces_one_that_hangs(registry, hang):
    registry.gauge("g", hang)
    assert registry.snapshot().series("g") == ()
    registry.gauge("g", lambda: 5)
    assert registry.get_stats().g.value == 5
    hang.goes_on.set()
    for _ in range(20):
        assert registry.get_stats().g.value == 5


def test_the_newest_producer_is_used_and_the_log_has_one_line(registry, caplog):
    for value in (1, 2, 3):
        registry.gauge("g", lambda value=value: value)
        assert registry.get_stats().g.value == value
    assert caplog.text.count("gauge 'g' got another producer") == 1


def test_the_same_producer_again_is_no_other_one(registry, caplog):
    class Pool:
        def size(self):
            return 4

    pool = Pool()
    registry.gauge("g", pool.size)
    registry.gauge("g", pool.size)
    assert caplog.text == ""
    assert registry.get_stats().g.value == 4


current = contextvars.ContextVar("current")


def test_a_producer_has_the_context_of_the_reader(registry):
    current.set(3)
    registry.gauge("g", current.get)
    assert registry.get_stats().g.value == 3


def test_a_producer_that_works_in_the_readers_thread_alone_has_a_value(registry):
    registry.gauge("tasks", lambda: len(asyncio.all_tasks()))

    async def main():
        return registry.get_stats().tasks.value

    assert asyncio.run(main()) == 1
    assert registry.own(tapes.Counter, "tapes.rejected").collect().counted == 0


@pytest.mark.parametrize("error", [asyncio.CancelledError, RuntimeError])
def test_where_no_thread_can_start_the_reader_runs_producers(registry, monkeypatch, error):
    def fails():
        raise error

    def refuse(worker):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("tapes.threads.NativeThread.start", refuse)
    registry.gauge("a", fails)
    registry.gauge("b", lambda: 2)
    assert registry.get_stats().b.value == 2
    assert registry.snapshot().series("a") == ()


def test_an_exception_of_a_signal_handler_ends_the_read_and_is_not_the_producers(registry, hang):
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    registry.gauge("g", hang)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Stop):
            registry.get_stats()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert registry.snapshot().series("g") == ()


def test_a_strict_block_raises_the_failure_of_a_producer_from_the_read():
    with strict(tapes.Registry()) as registry:
        registry.gauge("g", lambda: 1 / 0)
        with pytest.raises(BadValue, match="division by zero"):
            registry.get_stats()


def test_producers_that_fail_late_do_not_add_up(registry):
    """They run once: what takes long does not fail for the thread that it runs in."""

    def fails():
        time.sleep(0.4)
        raise OSError("timed out")

    for number in range(10):
        registry.gauge(f"g{number}", fails)
    start = time.monotonic()
    registry.snapshot()
    assert time.monotonic() - start < 3  # one after the other they take 4 s


class Queue:
    """Equal to any other, as an empty list is; compared with anything else it raises."""

    def __init__(self, length):
        self.length = length

    def __eq__(self, other):
        return bool(other.length) or True

    __hash__ = None

    def __call__(self):
        return self.length

    def size(self):
        return self.length


def test_producers_that_are_equal_are_two(registry, caplog):
    for length in (0, 3):
        registry.gauge("called", Queue(length))
        registry.gauge("method", Queue(length).size)
    stats = registry.get_stats()
    assert (stats.called.value, stats.method.value) == (3, 3)
    assert caplog.text.count("got another producer") == 2


def test_a_weak_producer_that_is_given_again_is_kept_if_it_is_no_longer_weak(registry):
    queue = Queue(4)
    registry.gauge("g", queue.size, weak=True)
    registry.gauge("g", queue.size)
    del queue
    assert registry.get_stats().g.value == 4


def test_a_read_leaves_no_thread_behind(registry):
    """A fork that follows would be one beside threads, of which Python warns."""
    registry.gauge("g", lambda: 1)
    before = threading.active_count()
    for _ in range(200):
        registry.snapshot()
        assert threading.active_count() == before
