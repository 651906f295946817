"""The producers of gauges: none delays another one, or a read for long, whatever it does."""

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
    """A read waits for a producer that was added during a round, because that round does not run it."""
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
    """A producer that raises any exception hides its own gauge only; the failure is counted and logged."""

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


def test_a_producer_that_hangs_delays_one_read_by_a_second(registry, caplog, hang):
    """A producer that hangs delays one read by a second, and no other producer; later it is run again."""
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


def test_several_producers_that_hang_delay_one_read_together(registry, hang):
    """Six producers that hang delay one read together, not one after the other."""
    for number in range(6):
        registry.gauge(f"hangs.{number}", hang)
        registry.gauge(f"works.{number}", lambda: 1)
    start = time.monotonic()
    works = registry.get_stats().works
    assert time.monotonic() - start < 5  # one after the other they would take 6 s
    assert len(works) == 6


def test_the_last_value_of_a_producer_that_hangs_stays_for_ten_seconds(registry, clock, hang):
    """While a producer hangs, its gauge shows the last value for ten seconds, and then none."""
    answers = [7]
    registry.gauge("g", lambda: answers.pop() if answers else hang())
    assert registry.get_stats().g.value == 7
    assert registry.get_stats().g.value == 7
    clock.advance(9)
    assert registry.get_stats().g.value == 7
    clock.advance(2)
    assert registry.snapshot().series("g") == ()


def test_a_new_producer_replaces_one_that_hangs(registry, hang):
    """A new producer replaces one that hangs, and the late result of the old one is ignored."""
    registry.gauge("g", hang)
    assert registry.snapshot().series("g") == ()
    registry.gauge("g", lambda: 5)
    assert registry.get_stats().g.value == 5
    hang.goes_on.set()
    for _ in range(20):
        assert registry.get_stats().g.value == 5


def test_the_newest_producer_is_used_and_the_log_has_one_line(registry, caplog):
    """If a gauge gets another producer, the newest one is used, and the log has one line about it."""
    for value in (1, 2, 3):
        registry.gauge("g", lambda value=value: value)
        assert registry.get_stats().g.value == value
    assert caplog.text.count("gauge 'g' got another producer") == 1


def test_the_same_producer_again_is_no_other_one(registry, caplog):
    """Giving the same bound method again is no change of the producer and is not logged."""

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
    """A producer sees the context variables of the thread that reads."""
    current.set(3)
    registry.gauge("g", current.get)
    assert registry.get_stats().g.value == 3


def test_a_producer_that_works_in_the_readers_thread_alone_has_a_value(registry):
    """A producer that works only in the reader's thread, as one that needs the event loop, has a value."""
    registry.gauge("tasks", lambda: len(asyncio.all_tasks()))

    async def main():
        return registry.get_stats().tasks.value

    assert asyncio.run(main()) == 1
    assert registry.own(tapes.Counter, "tapes.rejected").collect().counted == 0


@pytest.mark.parametrize("error", [asyncio.CancelledError, RuntimeError])
def test_where_no_thread_can_start_the_reader_runs_producers(registry, monkeypatch, error):
    """If no thread can be started, the reading thread runs the producers."""

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
    """An exception of a signal handler ends the read and is not taken for a failure of the producer."""

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
    """In a strict block a read raises the failure of a producer."""
    with strict(tapes.Registry()) as registry:
        registry.gauge("g", lambda: 1 / 0)
        with pytest.raises(BadValue, match="division by zero"):
            registry.get_stats()


def test_producers_that_fail_late_do_not_add_up(registry):
    """Producers that fail late run at the same time, not again in the reader's thread one by one."""

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
    """Producers that compare as equal are different producers, whatever their comparison does."""
    for length in (0, 3):
        registry.gauge("called", Queue(length))
        registry.gauge("method", Queue(length).size)
    stats = registry.get_stats()
    assert (stats.called.value, stats.method.value) == (3, 3)
    assert caplog.text.count("got another producer") == 2


def test_a_weak_producer_that_is_given_again_is_kept_if_it_is_no_longer_weak(registry):
    """A weak producer that is given again without ``weak`` is kept alive."""
    queue = Queue(4)
    registry.gauge("g", queue.size, weak=True)
    registry.gauge("g", queue.size)
    del queue
    assert registry.get_stats().g.value == 4


def test_a_read_leaves_no_thread_behind(registry):
    """A read leaves no thread running, so a later fork gives no warning."""
    registry.gauge("g", lambda: 1)
    before = set(threading.enumerate())
    for _ in range(200):
        registry.snapshot()
        assert set(threading.enumerate()) <= before


def test_a_read_waits_while_another_thread_starts_the_thread_of_producers(registry):
    """The thread that starts it may be slow; a read that comes meanwhile has the value of the gauge."""
    producers = Producers(registry)
    gauge = registry.gauge("g", lambda: 1)
    assert producers._starting.acquire(False)  # as the other thread does

    def run():
        registry.refresh(is_read=False)
        producers._ran.set()

    timer = threading.Timer(0.05, run)
    timer.start()
    producers.await_first()
    assert not gauge.awaits_producer
    timer.join()
