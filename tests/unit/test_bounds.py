"""Memory is bounded: by the documented limits, whatever is recorded, and without any reader."""

from __future__ import annotations

import gc
import math
import pathlib
import platform
import random

import pytest

import tapes
from tapes.metrics.folding import FULL

on_cpython = pytest.mark.skipif(
    platform.python_implementation() != "CPython", reason="tracemalloc measures CPython's allocations"
)

pytestmark = pytest.mark.timeout(300)  # tracemalloc takes its time, on a busy machine above all

KB = 1024


def latencies(count, seed=1):
    rng = random.Random(seed)
    return (min(10.0, max(1e-6, rng.lognormvariate(math.log(0.010), 1.6))) for _ in range(count))


def kept_by(fill):
    """Return the bytes that stay allocated after ``fill(registry)``, without the registry's own."""
    import tracemalloc  # which PyPy has not

    def kept() -> int:
        registry = tapes.Registry()
        registry.snapshot()
        tracemalloc.start()
        try:
            fill(registry)
            gc.collect()
            ours = tracemalloc.Filter(True, str(pathlib.Path(tapes.__file__).parent / "*"))
            found = tracemalloc.take_snapshot().filter_traces([ours])
        finally:
            tracemalloc.stop()
        return sum(trace.size for trace in found.traces)

    fill(tapes.Registry())  # what is made once and for all
    return min(kept() for _ in range(3))  # threads that other tests have left allocate too, now and then


@on_cpython
@pytest.mark.parametrize("read", [True, False], ids=["read", "never read"])
def test_a_filled_latency_histogram_takes_24_kb_at_most(read):
    """5,000 latencies over seven decades, in more than a thousand bins, take at most 24 KB."""

    def fill(registry):
        for value in latencies(5000):
            registry.timer("t").update(value)
        if read:
            registry.timer("t").collect()

    assert kept_by(fill) <= 24 * KB


@on_cpython
def test_memory_does_not_grow_with_the_number_of_events():
    """After 100,000 events of each kind, without a reader, only full buffers and bins take memory."""

    def fill(registry):
        for value in latencies(100_000):
            registry.timer("t").update(value)
            registry.counter("c").increment()
            registry.meter("m").mark()
            registry.gauge("g").set(value)

    assert kept_by(fill) <= 96 * KB


@on_cpython
def test_a_hostile_stream_over_all_magnitudes_stays_below_a_megabyte():
    """A stream that fills every bin of both signs takes less than a megabyte."""
    rng = random.Random(2)

    def fill(registry):
        histogram = registry.histogram("h")
        for _ in range(300_000):
            histogram.update(rng.choice((1, -1)) * 10.0 ** rng.uniform(-44, 38))
        histogram.collect()

    assert kept_by(fill) <= 1024 * KB


def test_a_full_buffer_folds_itself(registry):
    """A full buffer is folded without a reader, and every value counts."""
    histogram = registry.histogram("h")
    for value in range(10 * FULL):
        histogram.update(value % 7)
    assert len(histogram._buffer) < FULL
    assert registry.snapshot().get("h").count == 10 * FULL


def test_a_million_label_sets_are_all_counted_in_two_thousand_series(caplog):
    """Label sets beyond the limit are counted exactly in one series, and logged once."""
    made = 1_000_000
    registry = tapes.Registry()
    for number in range(made):
        registry.counter("c", user=str(number)).increment()
    family = registry.snapshot().family("c")
    assert len(family.series) == 2001
    assert sum(series.value for series in family.series) == made
    (overflow,) = (series for series in family.series if series.labels == (("overflow", "true"),))
    assert overflow.value == made - 2000
    assert len(caplog.records) == 1


@on_cpython
def test_label_sets_beyond_the_limit_take_no_memory():
    """Label sets beyond the limit take no memory, neither as series nor in the cache of look-ups."""

    def fill(registry):
        for number in range(30_000):
            registry.counter("c", user=number).increment()
            registry.counter("c", labels={"user": number, "queue": "mail"}).increment()

    assert kept_by(fill) <= 2600 * KB
