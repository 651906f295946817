"""What `make bench` asks: each function answers with a table to show and the budgets that it is held to."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from contenders import all_statements, unfolded
from measure import Figure, latencies, measure, medians_of

import tapes
from tapes.sketch import EMPTY

__all__ = [
    "BASE", "Row", "calls_alone", "hot_path", "imports", "memory", "quantiles", "ratio_row", "threads",
    "works",
]  # fmt: skip

BASE = "prometheus_client"


class Row(NamedTuple):
    """One line of the table of budgets."""

    what: str
    measured: str
    budget: str
    held: bool


def ratio_row(what: str, ratio: float, budget: float, of: str) -> Row:
    return Row(what, f"{ratio:.2f} × {of}", f"≤ {budget:g} ×", ratio <= budget)


# The hot path.


def hot_path() -> tuple[dict[tuple[str, str], Figure], list[Row]]:
    figures = measure({f"{a}|{b}": one for (a, b), one in all_statements().items()})
    by_name = {(name.split("|")[0], name.split("|")[1]): figure for name, figure in figures.items()}
    rows = []
    for row, what in (
        ("increment", "`increment()`"),
        ("update", "`update(v)`"),
        ("with", "`with timer.time()`"),
    ):
        ratio = by_name["tapes", row].empties / by_name[BASE, row].empties
        rows.append(ratio_row(f"{what}, folding included", ratio, 0.35, "prometheus_client"))
    ratio = by_name["tapes", "look-up"].empties / by_name[BASE, "look-up"].empties
    rows.append(ratio_row("`counter(name, **labels).increment()`", ratio, 0.35, "its `labels(**kw).inc()`"))
    return by_name, rows


def calls_alone() -> list[Row]:
    pairs = unfolded()
    statements = {f"{name}{side}": one for name, both in pairs.items() for side, one in enumerate(both)}
    figures = measure(statements)
    return [
        ratio_row(
            f"the call alone: `{name}`",
            figures[f"{name}0"].empties / figures[f"{name}1"].empties,
            2.5,
            "a call that reads the clock" if name == "mark()" else "an empty call",
        )
        for name in pairs
    ]


# Threads.


def threads() -> tuple[list[list[str]], list[Row]]:
    import prometheus_client

    def work(record: Callable[[], None], count: int) -> float:
        each = 120_000 // count
        start = threading.Barrier(count + 1)

        def run() -> None:
            start.wait()
            for _ in range(each):
                record()

        running = [threading.Thread(target=run) for _ in range(count)]
        for thread in running:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in running:
            thread.join()
        return (time.perf_counter() - began) / (each * count) * 1e9

    registry = tapes.Registry()
    theirs = prometheus_client.CollectorRegistry()
    records: dict[str, Callable[[], None]] = {
        "tapes increment()": registry.counter("c").increment,
        "tapes update(v)": lambda: registry_histogram.update(0.012),
        "prometheus_client inc()": prometheus_client.Counter("c", "c", registry=theirs).inc,
        "prometheus_client observe(v)": lambda: their_histogram.observe(0.012),
    }
    registry_histogram = registry.histogram("h")
    their_histogram = prometheus_client.Histogram("h", "h", registry=theirs)
    counts = (1, 2, 4, 8)
    times: dict[tuple[str, int], list[float]] = {}
    rounds = 7
    for number in range(rounds):
        order = [(name, count) for name in records for count in counts]
        random.Random(number).shuffle(order)
        for name, count in order:
            times.setdefault((name, count), []).append(work(records[name], count))
    expected = rounds * sum(120_000 // count * count for count in counts)
    snapshot = registry.snapshot()
    exact = snapshot.get("c").value == snapshot.get("h").count == expected
    table = [
        [name, *(f"{statistics.median(times[name, count]):.0f}" for count in counts)] for name in records
    ]
    return table, [Row("totals of 1, 2, 4 and 8 threads", "exact" if exact else "NOT EXACT", "exact", exact)]


# Work that takes milliseconds: folding and reading.


def works() -> tuple[list[list[str]], list[Row]]:
    wide = latencies(256 * 64)
    rng = random.Random(3)
    narrow = [0.02 * math.exp(rng.gauss(0, 0.3)) for _ in wide]
    timers = tapes.Registry()
    for number in range(1000):
        for value in narrow[number * 8 : number * 8 + 150]:
            timers.timer(f"t{number}").update(value)

    def fold(values: list[float]) -> Callable[[], object]:
        def run() -> object:
            sketch = EMPTY
            for start in range(0, len(values), 256):
                sketch = sketch.fold(values[start : start + 256], 1)  # type: ignore[arg-type]
            return sketch.compacted()

        return run

    seconds = medians_of(
        {
            "fold": fold(narrow),
            "fold wide": fold(wide),
            "snapshot": timers.snapshot,
            "get_stats": timers.get_stats,
        }
    )
    table = [
        ["fold a value, 250 bins", f"{seconds['fold'] / len(wide) * 1e9:.0f} ns"],
        ["fold a value, 1,500 bins", f"{seconds['fold wide'] / len(wide) * 1e9:.0f} ns"],
        ["snapshot of 1,000 timers", f"{seconds['snapshot'] * 1e3:.1f} ms"],
        ["get_stats() of 1,000 timers", f"{seconds['get_stats'] * 1e3:.1f} ms"],
    ]
    return table, []


# Memory.


def allocated(make: Callable[[], Any]) -> float:
    """Return the bytes that what ``make`` returns keeps alive."""
    make()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = make()
        return tracemalloc.get_traced_memory()[0] - before if kept else 0.0
    finally:
        tracemalloc.stop()


def memory() -> tuple[list[list[str]], list[Row]]:
    import prometheus_client

    def counters() -> Any:
        registry = tapes.Registry()
        return [registry.counter("c", path=f"/{number}") for number in range(1000)]

    def their_counters() -> Any:
        counter = prometheus_client.Counter("c", "c", ["path"], registry=None)
        return [counter.labels(f"/{number}") for number in range(1000)]

    def filled(values: Iterable[float], read: bool = True) -> Callable[[], Any]:
        def make() -> Any:
            registry = tapes.Registry()
            histogram = registry.histogram("h")
            for value in values:
                histogram.update(value)
            if read:
                histogram.collect()
            return histogram

        return make

    def their_histogram() -> Any:
        histogram = prometheus_client.Histogram("h", "h", registry=None)
        for value in latencies(5000):
            histogram.observe(value)
        return histogram

    rng = random.Random(5)
    hostile = [rng.choice((1, -1)) * 10 ** rng.uniform(-38, 38) for _ in range(300_000)]
    sizes = {
        "a counter with a label": allocated(counters) / 1000,
        "prometheus_client: a counter with a label": allocated(their_counters) / 1000,
        "a histogram of 5,000 latencies": allocated(filled(latencies(5000))),
        "the same, never read": allocated(filled(latencies(5000), read=False)),
        "a histogram of 200,000 latencies": allocated(filled(latencies(200_000))),
        "prometheus_client: a histogram of 15 buckets": allocated(their_histogram),
        "a histogram of 300,000 numbers of both signs over 76 decades": allocated(filled(hostile)),
    }
    with contextlib.suppress(ImportError):
        from ddsketch import DDSketch

        def sketch() -> Any:
            one = DDSketch(0.01)
            for value in latencies(5000):
                one.add(value)
            return one

        sizes["ddsketch (1 %): 5,000 latencies"] = allocated(sketch)
    table = [[what, f"{size / 1024:.1f} KB"] for what, size in sizes.items()]
    size = sizes["a histogram of 5,000 latencies"]
    rows = [
        Row("memory of a filled latency histogram", f"{size / 1024:.1f} KB", "≤ 24 KB", size <= 24 * 1024)
    ]
    return table, rows


# Import.


def imports() -> tuple[list[list[str]], list[Row]]:
    modules = ("tapes", "prometheus_client", "opentelemetry.sdk.metrics")
    times: dict[str, list[float]] = {}
    for number in range(11):
        order = ["pass", *(f"import {module}" for module in modules)]
        random.Random(number).shuffle(order)
        for code in order:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.setdefault(code, []).append(time.perf_counter() - start)
    bare = statistics.median(times["pass"])
    spent = {module: statistics.median(times[f"import {module}"]) - bare for module in modules}
    table = [[f"import {module}", f"{seconds * 1e3:.0f} ms"] for module, seconds in spent.items()]
    ratio = spent["tapes"] / spent["prometheus_client"]
    return table, [ratio_row("`import tapes`", ratio, 1.0, "`import prometheus_client`")]


# Quantiles.


def quantiles() -> tuple[list[list[str]], list[Row]]:
    rng = random.Random(7)
    streams: dict[str, Callable[[], float]] = {
        "log-normal": lambda: rng.lognormvariate(-4, 1.2),
        "Pareto": lambda: 0.005 * rng.paretovariate(1.5),
        "bimodal": lambda: (
            abs(rng.gauss(0.004, 0.0008) if rng.random() < 0.85 else rng.gauss(0.8, 0.1)) + 1e-6
        ),
        "uniform": lambda: rng.uniform(1e-6, 1),
        "Cauchy": lambda: math.tan(math.pi * (rng.random() - 0.5)),
        "twelve decades": lambda: 10 ** rng.uniform(-6, 6),
    }
    table, worst = [], 0.0
    for name, draw in streams.items():
        values = [draw() for _ in range(100_000)]
        ordered = sorted(values)
        line = [name]
        for parts in (1, 8):
            merged = type(EMPTY).merge(EMPTY.fold(values[part::parts], 1) for part in range(parts)).lifetime  # type: ignore[arg-type]
            error = 0.0
            for q in (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999):
                exact = ordered[math.ceil(q * len(ordered) - 1e-6) - 1]
                error = max(error, abs(merged.quantile(q) / exact - 1))
            line.append(f"{error * 100:.2f} %")
            worst = max(worst, error)
        table.append(line)
    return table, [
        Row(
            "quantile error, worst of p50–p99.9, also merged over 8",
            f"{worst * 100:.2f} %",
            "≤ 0.4 %",
            worst <= 0.004,
        )
    ]
