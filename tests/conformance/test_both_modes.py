"""One suite for the local and the connected registry: there is nothing that one of them can't do."""

from __future__ import annotations

import json
import threading
import time

import pytest

import tapes
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.exposition import render
from tests.processes import wait_for


@pytest.fixture(params=["local", "connected"])
def registry(request, short_dir):
    """A registry, alone or connected to an aggregator in a thread of this process."""
    if request.param == "local":
        yield tapes.Registry()
        return
    address = f"ipc://{short_dir}/m.ipc"
    aggregator = RegistryAggregator([], address)
    thread = threading.Thread(target=aggregator.start, kwargs={"fork": False})
    thread.start()
    registry = DistributedRegistry(address)
    registry.connect()
    wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
    try:
        yield registry
    finally:
        registry.close()
        aggregator.stop()
        thread.join()
    assert list(short_dir.iterdir()) == []


def test_every_kind_is_read_as_it_was_recorded(registry):
    """Counts, sums, extremes and quantiles of all kinds, with and without labels."""
    wait_for(lambda: time.monotonic() % 5 < 3, "no tick is near")
    for labels in ({}, {"l": "x"}):
        registry.counter("c", **labels).increment(5)
        registry.counter("c", **labels).decrement(2)
        registry.meter("m", **labels).mark(4)
        registry.gauge("g", **labels).set(2.5)
        registry.gauge("p", lambda: 7, **labels)
        for value in (1, 2, 2, 100):
            registry.histogram("h", **labels).update(value)
            registry.timer("t", **labels).update(value)
    stats = registry.get_stats()
    for selector in ("", '{l="x"}'):
        c, m, g, p, h, t = ((stats[n][selector] if selector else stats[n]) for n in "cmgpht")
        assert (c.value, m["count"], g.value, p.value) == (3, 4, 2.5, 7)
        for d in (h, t):
            assert (d["count"], d.sum, d.min, d.max, d.q50, d.q99, d.mean) == (4, 105, 1, 100, 2, 100, 26.25)
        assert (t.m1, m.m1) == (0.0, 0.0)


def test_a_read_sees_all_that_was_recorded_before_it(registry):
    """Each time, however fast they follow each other."""
    counter = registry.counter("c")
    for number in range(1, 200):
        counter.increment()
        assert registry.get_stats().c.value == number


def test_views_answer_any_quantile(registry):
    """Not only those that get_stats() shows."""
    for value in range(1, 101):
        registry.histogram("h").update(value)
    series = registry.snapshot().get("h")
    for view in (series.lifetime, series.recent):
        assert view.quantile(0.37) == 37
        assert view.fraction_below(42) == pytest.approx(0.42)


def test_bad_values_are_counted(registry):
    """In the same read."""
    registry.histogram("h").update("x")
    assert registry.get_stats().tapes.rejected.value == 1


def test_a_failing_producer_hides_its_gauge(registry):
    """And nothing else."""
    registry.gauge("bad", lambda: 1 / 0)
    registry.gauge("good", lambda: 1)
    snapshot = registry.snapshot()
    assert snapshot.series("bad") == ()
    assert snapshot.get("good").value == 1


def test_a_producer_may_read_the_registry(registry):
    """It gets an answer, and so does everybody else."""
    registry.counter("c").increment(4)
    registry.gauge("ratio", lambda: registry.get_stats().c.value / 2)
    assert wait_for(lambda: registry.get_stats().get("ratio"), "it was produced").value == 2.0


def test_extreme_values_keep_every_read_alive(registry):
    """The largest numbers, and larger ones, are recorded twice with a publication between."""
    for _ in range(2):
        registry.histogram("h").update(1.7e308)
        registry.gauge("g").set(1.7e308)
        for too_large in (0, 1):
            registry.meter("m").mark(2**53 + too_large)
            registry.counter("c").increment(2**53 + too_large)
        registry.get_stats()
    stats = registry.get_stats()
    assert (stats.c.value, stats.m["count"], stats.h["count"], stats.g.value) == (2**54, 2**54, 1, 1.7e308)
    assert stats.tapes.rejected.value == 5
    json.loads(render(registry, "json"))


def test_removed_series_are_gone(registry):
    """From the answer, at once."""
    registry.counter("c", l="a").increment()
    registry.counter("c", l="b").increment()
    assert registry.get_stats().c['{l="a"}'].value == 1
    registry.remove("c", l="a")
    wait_for(lambda: registry.snapshot().get("c", l="a") is None, "the series is gone")
    assert registry.snapshot().get("c", l="b").value == 1


def test_descriptions_and_units_are_written(registry):
    """Help and unit reach the exposition, in either order with the metric."""
    registry.histogram("h").update(1)
    registry.describe("h", "How large.", unit="bytes")
    wait_for(lambda: b"# HELP h_bytes How large." in render(registry, "prometheus"), "the description")
    assert b"h_bytes_count 1" in render(registry, "openmetrics")


def test_label_sets_are_bounded(registry):
    """With nothing lost."""
    for number in range(2100):
        registry.counter("c", user=number).increment()
    # On a busy machine, taking in so many may take longer than a read waits.
    series = wait_for(lambda: registry.snapshot().series("c"), "they are read")
    assert len(series) == 2001
    assert sum(one.value for one in series) == 2100


def test_many_threads_read_at_once(registry):
    """Each gets a whole answer."""
    registry.counter("c").increment(3)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(registry.get_stats().c.value)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [3] * 8
