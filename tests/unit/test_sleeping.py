"""Metrics that sleep: the first value recorded wakes a process, and no value is lost on the way."""

from __future__ import annotations

import sys
import threading

import pytest

import tapes
from tapes.session import Session
from tapes.testing import ManualClock


class Sleeping(Session):
    """A session whose metrics sleep, and which answers what `wake` returns."""

    def __init__(self, registry, wake):
        super().__init__(registry)
        self.sleeps, self.wake = True, wake

    def woken(self):
        return self.wake()

    def snapshot(self):
        return self.registry.local_snapshot()


def sleep(registry, wake):
    registry.use(Sleeping(registry, wake))


RECORD = {
    "counter": lambda r: r.counter("m").increment(),
    "decrement": lambda r: r.counter("m").decrement(),
    "meter": lambda r: r.meter("m").mark(),
    "histogram": lambda r: r.histogram("m").update(3),
    "timer": lambda r: r.timer("m").update(0.5),
    "timing": lambda r: r.timer("m").time().__enter__().__exit__(None, None, None),
    "set": lambda r: r.gauge("m").set(3),
    "an unusual number": lambda r: r.gauge("m").set(True),
    "move": lambda r: r.gauge("m").increment(),
    "producer": lambda r: r.gauge("m").produce(lambda: 3),
}


@pytest.mark.parametrize("record", RECORD.values(), ids=RECORD)
@pytest.mark.parametrize("is_made_before", [True, False])
def test_the_first_value_of_any_metric_wakes(record, is_made_before):
    """The first value recorded into any sleeping metric calls ``wake`` once."""
    registry, woken = tapes.Registry(clock=ManualClock(1000.0)), []
    if is_made_before:
        record(registry)
    sleep(registry, lambda: woken.append(1) or True)
    assert not woken
    record(registry)
    assert woken == [1]
    record(registry)
    assert woken == [1]


def test_values_are_counted_asleep_and_awake(registry):
    """Values from before the sleep, the one that wakes and later ones all count."""
    counter = registry.counter("c")
    counter.increment(1)
    sleep(registry, lambda: True)
    assert counter.collect().counted == 1
    counter.increment(10)
    counter.increment(100)
    assert counter.collect().counted == 111


def test_a_metric_sleeps_on_for_as_long_as_wake_says_so(registry):
    """While ``wake`` returns False a metric keeps sleeping, and each value calls it again and counts."""
    answers = [False, False, True]
    counter, gauge = registry.counter("c"), registry.gauge("g")
    sleep(registry, lambda: answers.pop(0))
    for _ in range(5):
        counter.increment()
    assert answers == []
    assert counter.collect().counted == 5
    sleep(registry, lambda: False)
    gauge.set(5)
    gauge.increment(2)
    assert gauge.collect().value == 7


def test_reading_and_folding_does_not_wake(registry):
    """A read or a fold does not call ``wake``, because it records nothing."""
    registry.counter("c").increment()
    sleep(registry, lambda: pytest.fail("it was woken"))
    assert registry.get_stats().c.value == 1
    assert [state for *_, state in registry.collect()]


def test_threads_that_record_while_metrics_are_put_to_sleep_lose_nothing():
    """Threads that record while another thread puts metrics to sleep lose no value."""
    registry, stop = tapes.Registry(), threading.Event()
    counter = registry.counter("c")
    counted = [0] * 4

    def record(index: int) -> None:
        while not stop.is_set():
            counter.increment()
            counted[index] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=record, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3000):
            sleep(registry, lambda: True)
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(counted) > 1000
    assert counter.collect().counted == sum(counted)


def test_a_wake_that_records_itself():
    """Values that ``wake`` records count, and call it again only for metrics that still sleep."""
    registry, calls = tapes.Registry(), []

    def wake() -> bool:
        calls.append(1)
        if len(calls) == 1:
            registry.counter("other").increment()
        return True

    registry.counter("c"), registry.counter("other")
    sleep(registry, wake)
    registry.counter("c").increment()
    assert len(calls) == 2
    assert (registry.counter("c").collect().counted, registry.counter("other").collect().counted) == (1, 1)
