"""One suite for the local and the connected registry: both do everything, and show the same."""

from __future__ import annotations

import json
import threading
import time

import pytest

import tapes
from tapes.clock import tick_at
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


LABELS = ({}, {"l": "x"})


def record_every_kind(registry, group):
    """Record the same events in each kind of metric, with and without labels, below the name ``group``."""
    for labels in LABELS:
        registry.counter(f"{group}.c", **labels).increment(5)
        registry.counter(f"{group}.c", **labels).decrement(2)
        registry.meter(f"{group}.m", **labels).mark(4)
        registry.gauge(f"{group}.g", **labels).set(2.5)
        registry.gauge(f"{group}.p", lambda: 7, **labels)
        for value in (1, 2, 2, 100):
            registry.histogram(f"{group}.h", **labels).update(value)
            registry.timer(f"{group}.t", **labels).update(value)


def test_every_kind_is_read_as_it_was_recorded(registry):
    """Every kind is read with exact counts, sums, extremes and quantiles, with and without labels."""
    for attempt in range(20):
        tick = tick_at(time.monotonic())
        record_every_kind(registry, f"n{attempt}")
        stats = registry.get_stats()[f"n{attempt}"]
        if tick_at(time.monotonic()) == tick:
            break  # else a tick between the events has changed rates and weights
    else:
        pytest.fail("a tick passed in each of 20 attempts")
    for selector in ("", '{l="x"}'):
        c, m, g, p, h, t = ((stats[n][selector] if selector else stats[n]) for n in "cmgpht")
        assert (c.value, m["count"], g.value, p.value) == (3, 4, 2.5, 7)
        for d in (h, t):
            assert (d["count"], d.sum, d.min, d.max, d.q50, d.q99, d.mean) == (4, 105, 1, 100, 2, 100, 26.25)
        assert (t.m1, m.m1) == (0.0, 0.0)


def test_a_read_sees_all_that_was_recorded_before_it(registry):
    """Each read sees every event that its process recorded before it, however fast the reads follow."""
    counter = registry.counter("c")
    for number in range(1, 200):
        counter.increment()
        assert registry.get_stats().c.value == number


def test_both_distributions_answer_any_quantile(registry):
    """The lifetime and the recent distribution answer any quantile and any fraction below a value."""
    for value in range(1, 101):
        registry.histogram("h").update(value)
    series = registry.snapshot().get("h")
    for view in (series.lifetime, series.recent):
        assert view.quantile(0.37) == 37
        assert view.fraction_below(42) == pytest.approx(0.42)


def test_a_bad_value_is_counted_in_the_next_read(registry):
    """A bad value is counted in ``tapes.rejected`` by the next read."""
    registry.histogram("h").update("x")
    assert registry.get_stats().tapes.rejected.value == 1


def test_a_failing_producer_hides_its_own_gauge_only(registry):
    """A gauge whose producer fails is left out of a read, and all other gauges are in it."""
    registry.gauge("bad", lambda: 1 / 0)
    registry.gauge("good", lambda: 1)
    snapshot = registry.snapshot()
    assert snapshot.series("bad") == ()
    assert snapshot.get("good").value == 1


def test_a_producer_may_read_the_registry(registry):
    """A producer that reads the registry gets an answer, and so does the reader that called it."""
    registry.counter("c").increment(4)
    registry.gauge("ratio", lambda: registry.get_stats().c.value / 2)
    assert wait_for(lambda: registry.get_stats().get("ratio"), "it was produced").value == 2.0


def test_extreme_values_keep_every_read_alive(registry):
    """The largest numbers and larger ones, recorded twice, break neither a read nor its JSON."""
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


def test_a_removed_series_is_not_read_any_more(registry):
    """A removed series is in no later answer, and the other series of its name stay."""
    registry.counter("c", l="a").increment()
    registry.counter("c", l="b").increment()
    assert registry.get_stats().c['{l="a"}'].value == 1
    registry.remove("c", l="a")
    wait_for(lambda: registry.snapshot().get("c", l="a") is None, "the series is gone")
    assert registry.snapshot().get("c", l="b").value == 1


def test_descriptions_and_units_are_written(registry):
    """Description and unit are in the exposition, whether they are given before or after the first event."""
    registry.histogram("h").update(1)
    registry.describe("h", "How large.", unit="bytes")
    wait_for(lambda: b"# HELP h_bytes How large." in render(registry, "prometheus"), "the description")
    assert b"h_bytes_count 1" in render(registry, "openmetrics")


def test_label_sets_are_bounded(registry):
    """A name keeps at most max_series label sets; events beyond them count in the overflow series."""
    for number in range(2100):
        registry.counter("c", user=number).increment()
    # On a busy machine, taking in so many may take longer than a read waits.
    series = wait_for(lambda: registry.snapshot().series("c"), "they are read")
    assert len(series) == 2001
    assert sum(one.value for one in series) == 2100


def test_many_threads_read_at_once(registry):
    """Eight threads that read at once each get a complete answer."""
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
