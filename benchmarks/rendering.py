"""What writing for Prometheus costs beside prometheus_client: the same names, labels and values, in turns.

Each is written as it stands, and after every series was recorded into, folding included. Both sides' buckets
are tapes' own.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from measure import latencies
from questions import BASE, Row, ratio_row

import tapes
from tapes.exposition import prometheus as exposition

__all__ = ["rendering"]

ROUNDS = 9

Touch = Callable[[], object]


class Pair(NamedTuple):
    """Both registries, and what records once into each of their series."""

    ours: tapes.Registry
    theirs: Any
    touches: list[Touch]


def empty() -> Pair:
    import prometheus_client

    return Pair(tapes.Registry(max_series=20_000), prometheus_client.CollectorRegistry(), [])


def add_counters(pair: Pair, names: int, sets: int, kind: str = "counter") -> None:
    import prometheus_client

    for name in (f"{kind}{number}" for number in range(names)):
        counter = prometheus_client.Counter(name, "Requests", ["path"], registry=pair.theirs)
        for number in range(sets):
            theirs, ours = counter.labels(path=f"/api/{number}"), getattr(pair.ours, kind)
            mine = ours(name, path=f"/api/{number}")
            count = mine.increment if kind == "counter" else mine.mark
            count(number)
            theirs.inc(number)
            pair.touches.extend((count, theirs.inc))


def add_gauges(pair: Pair, names: int, sets: int) -> None:
    import prometheus_client

    for name in (f"gauge{number}" for number in range(names)):
        gauge = prometheus_client.Gauge(name, "Connections", ["path"], registry=pair.theirs)
        for number in range(sets):
            theirs = gauge.labels(path=f"/api/{number}")
            mine = pair.ours.gauge(name, path=f"/api/{number}")
            for set_value in (mine.set, theirs.set):
                set_value(number + 0.5)
                pair.touches.append(lambda set_value=set_value, value=number + 1.5: set_value(value))


def add_timers(pair: Pair, names: int, sets: int, values: int) -> None:
    import prometheus_client

    for name in (f"timer{number}" for number in range(names)):
        histogram = prometheus_client.Histogram(
            name, "Latency", ["path"], registry=pair.theirs, buckets=exposition.TIMER_BUCKETS
        )
        for number in range(sets):
            theirs = histogram.labels(path=f"/api/{number}")
            mine = pair.ours.timer(name, path=f"/api/{number}")
            for record in (mine.update, theirs.observe):
                for value in latencies(values, number):
                    record(value)
                pair.touches.append(lambda record=record: record(0.02))


def cases() -> Iterator[tuple[str, Pair]]:
    pair = empty()
    add_counters(pair, 20, 500)
    yield "10,000 counters", pair
    pair = empty()
    add_gauges(pair, 20, 500)
    yield "10,000 gauges", pair
    pair = empty()
    add_counters(pair, 10, 250)
    add_counters(pair, 10, 250, "meter")
    add_gauges(pair, 10, 250)
    add_timers(pair, 10, 15, 50)
    yield "7,650 series of every kind, 10,050 lines", pair
    pair = empty()
    add_timers(pair, 1, 1000, 150)
    yield "1,000 timers, 17,000 lines", pair


def seconds_of(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(pair: Pair) -> dict[tuple[bool, bool], tuple[float, float]]:
    """Return seconds and the ratio to theirs, by whether it is OpenMetrics, and touched: medians."""
    import prometheus_client
    from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_latest

    taken: dict[tuple[bool, bool], list[tuple[float, float]]] = {}
    for number in range(ROUNDS):
        order = [(openmetrics, touched) for openmetrics in (False, True) for touched in (False, True)]
        random.Random(number).shuffle(order)
        for openmetrics, touched in order:
            exposition.render(pair.ours)
            for touch in pair.touches if touched else ():
                touch()
            latest = openmetrics_latest if openmetrics else prometheus_client.generate_latest
            ours = seconds_of(lambda which=openmetrics: exposition.render(pair.ours, openmetrics=which))
            theirs = seconds_of(lambda latest=latest: latest(pair.theirs))
            taken.setdefault((openmetrics, touched), []).append((ours, ours / theirs))
    return {which: tuple(map(statistics.median, zip(*one))) for which, one in taken.items()}  # type: ignore[misc]


def rendering() -> tuple[list[list[str]], list[Row]]:
    table, rows = [], []
    for what, pair in cases():
        figures = compare(pair)
        line = [what]
        for which in ((False, False), (False, True), (True, False), (True, True)):
            seconds, ratio = figures[which]
            line.append(f"{seconds * 1e3:.1f} ms ({ratio:.2f} ×)")
        table.append(line)
        rows.append(ratio_row(f"Prometheus text of {what}", figures[False, False][1], 0.2, BASE))
    return table, rows
