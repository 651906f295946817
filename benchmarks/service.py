"""What a connected registry costs, and how soon it answers: recording, another worker's events, scraping.

Everything is real: an aggregator in a process of its own, workers that are connected to it, and the WSGI
adapter's ``/metrics``.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from load import Reader, Shape, Workers, aggregator, series_of
from measure import Statement, measure
from questions import Row, ratio_row

import tapes
from tapes.contrib.wsgi import TapesMiddleware
from tapes.distributed.registry import DistributedRegistry

__all__ = ["connected", "scraping", "visibility"]

TRIALS = 60
VISIBLE_SECONDS = 0.3
LOOK_EVERY_SECONDS = 0.003
SCRAPES = 60
LINES, MORE_LINES = 10_000, 40_000
SCRAPE_SECONDS, SECONDS_PER_MEGABYTE = 0.6e-3, 0.4e-3


@contextlib.contextmanager
def connected_registry(address: str, **options: Any) -> Iterator[tapes.Registry]:
    registry = DistributedRegistry(address, **options)
    registry.connect()
    try:
        yield registry
    finally:
        registry.close()


def scraper(registry: tapes.Registry) -> Callable[[], bytes]:
    """Return what asks a worker's application for ``/metrics``, as Prometheus does."""
    app = TapesMiddleware(lambda environ, start_response: [], registry)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "HTTP_ACCEPT": "text/plain; version=0.0.4"}

    def scrape() -> bytes:
        statuses: list[str] = []
        body = app(dict(environ), lambda status, headers: statuses.append(status))
        (text,) = body
        if not statuses[0].startswith("200"):
            raise RuntimeError(f"{statuses[0]}: {text.decode()}")
        return text

    return scrape


# Recording.


def connected() -> list[Row]:
    local = tapes.Registry()
    with aggregator() as one, connected_registry(one.address) as registry:
        registry.get_stats()
        statements = {}
        for side, which in (("local", local), ("connected", registry)):
            names = {"c": which.counter("c"), "h": which.histogram("h"), "t": which.timer("t")}
            for what, code in (
                ("increment()", "c.increment()"),
                ("update(v)", "h.update(v)"),
                ("with timer.time()", "with t.time(): pass"),
            ):
                statements[f"{what}|{side}"] = Statement(code, names)
        figures = measure(statements)
    rows = []
    for what in ("increment()", "update(v)", "with timer.time()"):
        ratio = figures[f"{what}|connected"].empties / figures[f"{what}|local"].empties
        rows.append(ratio_row(f"connected to an aggregator: `{what}`", ratio, 1.1, "not connected"))
    return rows


# From an event to its being seen by another worker.

RECORDER = """
import sys, time
from tapes.distributed.registry import DistributedRegistry
registry = DistributedRegistry(sys.argv[1])
registry.connect()
events = registry.counter("events")
print(flush=True)
for line in sys.stdin:
    time.sleep(float(line))
    now = time.monotonic()
    events.increment()
    print(now, flush=True)
registry.close()
"""


def visibility() -> tuple[list[list[str]], list[Row]]:
    """Measure from the moment before an event in one worker to another worker's answer that has it."""
    command = [sys.executable, "-c", RECORDER]
    pipe = subprocess.PIPE
    with aggregator() as one, connected_registry(one.address) as registry:
        recorder = subprocess.Popen([*command, one.address], stdin=pipe, stdout=pipe, text=True, bufsize=1)
        assert recorder.stdin
        assert recorder.stdout
        try:
            recorder.stdout.readline()
            scrape, rng, seconds = scraper(registry), random.Random(11), []
            for number in range(1, TRIALS + 1):
                print(rng.uniform(0.0, 0.25), file=recorder.stdin)
                wanted = b"\nevents_total %d\n" % number
                recorded = float(recorder.stdout.readline())
                while wanted not in scrape():
                    time.sleep(LOOK_EVERY_SECONDS)
                seconds.append(time.monotonic() - recorded)
        finally:
            recorder.communicate(timeout=20)
    ordered = sorted(seconds)
    median, most, worst = statistics.median(ordered), ordered[int(0.95 * TRIALS)], ordered[-1]
    table = [[f"{TRIALS} events", *(f"{value * 1e3:.0f} ms" for value in (ordered[0], median, most, worst))]]
    measured = f"median {median:.2f} s, worst of {TRIALS} {worst:.2f} s"
    held = worst <= VISIBLE_SECONDS
    return table, [Row("event to visible in another worker's `/metrics`", measured, "≤ 0.3 s", held)]


# Scraping through a worker.


class Scrape(NamedTuple):
    """What a scrape costs the worker: bytes of the answer, and seconds of processor time, all threads."""

    size: int
    median: float
    mean: float


def scrape_cost(lines: int, *, own: bool) -> Scrape:
    """Return what it costs a worker, itself or another one of which has all the series."""
    shape = Shape(counters=lines)
    with aggregator() as one, contextlib.ExitStack() as stack:
        registry = stack.enter_context(connected_registry(one.address))
        reader = Reader(one.address)
        stack.callback(reader.close)
        if own:
            for number in range(lines):
                series_of(registry, "counter", number, 1).increment(number)
        else:
            workers = Workers(one.address, 1, shape, shape)
            stack.callback(workers.close)
            workers.introduce(reader)
        while reader.read().count(b"\nshop_counter") < lines:  # the text of HELP and TYPE begins with #
            time.sleep(0.05)
        scrape, spent = scraper(registry), []
        scrape()
        started = time.process_time()
        for _ in range(SCRAPES):
            began = time.process_time()
            size = len(scrape())
            spent.append(time.process_time() - began)
        mean = (time.process_time() - started) / SCRAPES
    return Scrape(size, statistics.median(spent), mean)


def scraping() -> tuple[list[list[str]], list[Row]]:
    """Ask in a process of its own, so that nothing else of this one is counted."""
    cases = {
        f"{LINES:,} lines, all of other workers": (LINES, False),
        f"{LINES:,} lines, all of them also its own": (LINES, True),
        f"{MORE_LINES:,} lines, all of other workers": (MORE_LINES, False),
    }
    costs = {what: _in_a_process(*case) for what, case in cases.items()}
    table = [
        [what, f"{one.size / 1e6:.2f} MB", f"{one.median * 1e3:.2f} ms", f"{one.mean * 1e3:.2f} ms"]
        for what, one in costs.items()
    ]
    few, own, many = costs.values()
    further = (many.median - few.median) / ((many.size - few.size) / 1e6)
    what = f"a worker's processor time for a scrape of {LINES:,} lines"
    rows = [
        Row(f"{what}{of}", f"{one.median * 1e3:.2f} ms", "≤ 0.6 ms", one.median <= SCRAPE_SECONDS)
        for of, one in (("", few), (", all also its own", own))
    ]
    held = further <= SECONDS_PER_MEGABYTE
    what = "a worker's processor time for each further MB of a scrape"
    return table, [*rows, Row(what, f"{further * 1e3:.2f} ms", "≤ 0.4 ms", held)]


def _in_a_process(lines: int, own: bool) -> Scrape:
    done = subprocess.run(
        [sys.executable, __file__, str(lines), str(int(own))], capture_output=True, text=True, check=True
    )
    size, median, mean = map(float, done.stdout.split())
    return Scrape(int(size), median, mean)


if __name__ == "__main__":
    print(*scrape_cost(int(sys.argv[1]), own=sys.argv[2] == "1"))
