"""What one point of the grid costs an aggregator, and what an update costs its worker.

Processor time, not time: other jobs may share the machine. An aggregator that rests between updates spends
more on each than one that always has another to do, as caches are cold and clocks are low when it wakes up.
So both are measured, in turns: bursts, and the same evenly spread. The least of some rounds counts, as
neighbours on the machine can only add to processor time.
"""

from __future__ import annotations

import contextlib
import gc
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from law import Point
from load import Aggregator, Reader, Shape, Workers, aggregator, distribution, series_of

import tapes
from tapes.distributed.protocol.wire import encode
from tapes.distributed.worker.outbox import Outbox

__all__ = ["Measured", "journal_seconds", "measure", "measure_real", "publish_seconds"]

READS = 2
ROUNDS = 3
PACED_SECONDS = 0.3
BURST_SECONDS = 0.2
REAL_SECONDS = 3.0
JOURNAL_WAIT_SECONDS = 4.0
CHECK_SECONDS = 1.0
"""Long enough for the journal to be written once."""


class Measured(NamedTuple):
    """What one point cost.

    Attributes:
        idle: Seconds of processor time in a second without any message.
        busy: Seconds of processor time for an update, where the aggregator always has another one to do.
        per_second: How many updates there were of all workers together, evenly spread.
        used: Seconds of processor time that a second with these took.
        dirty, clean: Of a read after an update, less what one without costs; and that.
        grown, empty: By how many bytes the aggregator has grown since it started, and what it had then.
    """

    point: Point
    idle: float
    busy: float
    per_second: float
    used: float
    dirty: float
    clean: float
    grown: int
    empty: int


def measure(point: Point, *, is_check: bool = False) -> Measured:
    """Return what ``point`` costs; a check has longer spells of evenly spread updates, journal included."""
    gc.collect()
    with aggregator() as one, contextlib.ExitStack() as stack:
        reader = Reader(one.address)
        stack.callback(reader.close)
        others = reader.messages() - reader.asked
        empty = one.resident()
        workers = Workers(one.address, point.workers, point.shape, point.touched)
        stack.callback(workers.close)
        workers.introduce(reader)
        _await_rest(one, reader)
        idle_seconds = _spent(one, lambda: time.sleep(0.3)) / 0.3
        dirty, clean = [], []
        for _ in range(READS):
            workers.publish(min(point.workers, 5), 0.5 / guess(point.touched))
            _await_rest(one, reader)
            dirty.append(_spent(one, reader.read))
            clean.append(_spent(one, reader.read))
        grown = one.resident() - empty
        paces, bursts = [], []
        spell = CHECK_SECONDS if is_check else PACED_SECONDS
        for _ in range(ROUNDS - is_check):
            paces.append(_paced(one, reader, workers, point.load / guess(point.touched), spell))
            bursts.append(_burst(one, reader, workers, guess(point.touched)))
        assert reader.messages() - reader.asked - others == workers.sent, "messages were lost"
    per_second, used = min(paces, key=lambda pace: pace[1] / pace[0])
    if is_check:  # the journal is in some of them
        per_second, used = (statistics.mean(column) for column in zip(*paces))
    busy, again = min(bursts), min(clean)
    return Measured(
        point, idle_seconds, busy, per_second, used, min(dirty) - again, again,
        grown, empty,
    )  # fmt: skip


def guess(touched: Shape) -> float:
    """Return about how many seconds of processor time an update costs, to choose a pace by."""
    return 100e-6 + touched.counters * 14e-6 + touched.distributions * (15e-6 + touched.bins * 0.35e-6)


def journal_seconds(point: Point) -> float:
    """Return what it costs to write the journal once.

    It is written within a second of a change, or later if the last one took long; so it is waited for.
    """
    gc.collect()
    with aggregator() as one, contextlib.ExitStack() as stack:
        reader = Reader(one.address)
        stack.callback(reader.close)
        workers = Workers(one.address, point.workers, point.shape, point.touched)
        stack.callback(workers.close)
        workers.introduce(reader)
        _await_rest(one, reader)
        time.sleep(JOURNAL_WAIT_SECONDS)
        began, cpu = time.monotonic(), one.cpu()
        workers.publish(1, 1e9)
        time.sleep(JOURNAL_WAIT_SECONDS)
        spent, seconds = one.cpu() - cpu, time.monotonic() - began
        idle = _spent(one, lambda: time.sleep(0.5)) / 0.5
    return max(0.0, spent - seconds * idle - guess(point.touched))


def _paced(
    one: Aggregator, reader: Reader, workers: Workers, per_second: float, spell: float
) -> tuple[float, float]:
    """Return updates per second, and the seconds of processor time that a second with them takes."""
    updates = int(per_second * spell) + 1
    began = one.cpu()
    seconds = workers.publish(updates, per_second)
    _await_rest(one, reader)
    return updates / seconds, (one.cpu() - began) / seconds


def _burst(one: Aggregator, reader: Reader, workers: Workers, seconds_each: float) -> float:
    """Return what an update costs an aggregator that has no rest between them."""
    updates = int(BURST_SECONDS / seconds_each) + 5
    began = one.cpu()
    workers.publish(updates, 1e9)
    _await_rest(one, reader)
    return (one.cpu() - began) / updates


def _spent(one: Aggregator, work: Callable[[], object]) -> float:
    before = one.cpu()
    work()
    return one.cpu() - before


def _await_rest(one: Aggregator, reader: Reader) -> None:
    """Wait until the aggregator has done what it was given: also where others take its core."""
    reader.await_turn()
    while _spent(one, lambda: time.sleep(0.02)) > 0.003:
        pass
    reader.await_turn()


# The other side: what an update costs the worker.


def publish_seconds(shape: Shape) -> float:
    """Return the processor time that a worker needs to publish all of ``shape``, five values of each."""
    registry = tapes.Registry()
    metrics = []
    for kind, count in zip(("counter", "histogram", "timer"), shape):
        for number in range(count):
            metric = series_of(registry, kind, number, shape.labels)
            values = distribution(shape.bins, number) if kind != "counter" else [1]
            record = metric.update if kind != "counter" else metric.increment
            for value in values:
                record(value)
            metrics.append((record, values[:5]))
    outbox = Outbox(registry)
    outbox.publish(lambda update: bool(encode(update)), keyframe=True)
    spent = []
    for _ in range(7):
        for record, values in metrics:
            for value in values:
                record(value)
        began = time.thread_time()
        outbox.publish(lambda update: bool(encode(update)))
        spent.append(time.thread_time() - began)
    return statistics.median(spent)


# Real workers.


@contextlib.contextmanager
def real_workers(address: str, count: int, shape: Shape) -> Iterator[None]:
    """Start processes whose registries are connected, and that touch all their series all the time."""
    code = pathlib.Path(__file__).with_name("real_worker.py")
    command = [sys.executable, str(code), address, *map(str, shape)]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in running:
            process.stdout.readline()  # type: ignore[union-attr]
        yield
    finally:
        for process in running:
            process.communicate(timeout=20)


def measure_real(count: int, shape: Shape) -> tuple[float, float]:
    """Return updates per second, and the seconds of processor time that a second with them takes."""
    with aggregator() as one, real_workers(one.address, count, shape):
        reader = Reader(one.address)
        time.sleep(0.5)
        messages, began, cpu = reader.messages(), time.monotonic(), one.cpu()
        time.sleep(REAL_SECONDS)
        used, seconds = one.cpu() - cpu, time.monotonic() - began
        messages = reader.messages() - messages - 1
        reader.close()
    return messages / seconds, used / seconds
