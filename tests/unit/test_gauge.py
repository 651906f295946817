"""Gauges: set and moved in the order of the calls, or produced when read."""

from __future__ import annotations

import gc
import math
import threading

import pytest


def rejected(registry):
    series = registry.snapshot().get("tapes.rejected")
    return series.value if series else 0


def test_a_gauge_is_set_and_moved(registry):
    """Sets and moves of a gauge take effect in the order of the calls."""
    gauge = registry.gauge("g")
    gauge.increment(5)
    gauge.set(2)
    gauge.increment()
    gauge.decrement(4)
    assert registry.get_stats().g.value == -1


def test_a_gauge_stands_since_it_was_set_or_first_moved(registry, clock):
    """A gauge's time is that of its first move or last set; later moves do not make it newer."""
    gauge = registry.gauge("g", merge="last")
    assert gauge.collect() == (0, "last", None)
    gauge.increment(3)
    assert gauge.collect() == (3, "last", 1000.0)
    clock.advance(2)
    gauge.increment(math.nan)
    gauge.decrement(1)
    assert gauge.collect() == (2, "last", 1000.0)
    gauge.set(7)
    clock.advance(2)
    gauge.increment(1)
    assert gauge.collect() == (8, "last", 1002.0)


def test_a_failing_producer_hides_its_gauge_and_nothing_else(registry, caplog):
    """A gauge whose producer fails is hidden, counted, logged once, and tried again at the next read."""
    answers = [1 / 3, None]
    registry.gauge("bad", lambda: 1 / (len(answers) - 2))
    registry.gauge("good", lambda: 7)
    for _ in range(2):
        snapshot = registry.snapshot()
        assert snapshot.get("good").value == 7
        assert snapshot.series("bad") == ()
    assert rejected(registry) == 3
    assert len(caplog.records) == 1
    answers.append(0)
    assert registry.snapshot().get("bad").value == 1.0


def test_a_weak_gauge_does_not_keep_its_object_alive(registry):
    """A weak gauge does not keep its object alive, and takes a new producer once that is gone."""

    class Pool:
        def size(self):
            return 4

    pool = Pool()
    registry.gauge("g", pool.size, weak=True)
    assert registry.get_stats().g.value == 4
    del pool
    gc.collect()
    assert registry.snapshot().series("g") == ()
    registry.gauge("g", lambda: 5)
    assert registry.get_stats().g.value == 5


def test_a_producer_that_reads_its_own_registry_is_answered(registry):
    """A producer that reads its own registry gets the last value, and no recursion."""
    registry.counter("c").increment(4)
    registry.gauge("ratio", lambda: registry.get_stats().c.value / 2)
    assert registry.get_stats().ratio.value == 2.0


def test_what_was_set_last_overtakes_all_steps_before_it(registry):
    """A set replaces all steps before it, folded or not, and later steps start from it."""
    gauge = registry.gauge("g")
    for _ in range(1000):
        gauge.increment()
    gauge.set(5)
    gauge.increment(2)
    gauge.set(10)
    gauge.decrement(4)
    assert registry.get_stats().g.value == 6
    gauge.increment()
    assert registry.get_stats().g.value == 7
    gauge.set(10)
    assert registry.get_stats().g.value == 10


@pytest.mark.parametrize(("record", "bad"), [("set", "12"), ("increment", math.nan), ("decrement", None)])
def test_a_bad_value_of_a_gauge_is_logged_as_it_was_given(registry, caplog, record, bad):
    """A bad value does not change a gauge, and the log shows it as it was given."""
    gauge = registry.gauge("g")
    gauge.set(3)
    getattr(gauge, record)(bad)
    assert registry.get_stats().g.value == 3
    assert rejected(registry) == 1
    assert f"dropped {bad!r} for 'g'" in caplog.text


def test_steps_of_threads_all_count(registry):
    """Four threads step up, four step down: the value is the difference."""
    gauge = registry.gauge("g")
    gauge.set(100)

    def move(step):
        for _ in range(2000):
            step()

    threads = [threading.Thread(target=move, args=[gauge.increment]) for _ in range(4)]
    threads += [threading.Thread(target=move, args=[gauge.decrement]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.get_stats().g.value == 100
