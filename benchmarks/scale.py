"""`make scale`: how many workers one aggregator serves, what memory it takes, and the model of its costs.

Writes docs/scale.md. Takes two to three minutes, on two cores.
"""

from __future__ import annotations

import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import law
from costs import Measured, journal_seconds, measure, measure_real, publish_seconds
from law import INTERVAL_SECONDS, SHARE, Law, Laws, Point, fit, pace_of
from load import Shape
from run import markdown

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "scale.md"
MAX_SECONDS = 195.0
"""After this time, the remaining points that only validate the model are left out."""
READ_EVERY_SECONDS = 15.0
REAL_WORKERS, REAL_SHAPE = 3, Shape(60, 0, 20)


def all_touched(workers: int, *, load: float = 0.4, **shape: int) -> Point:
    every = Shape(**shape)
    return Point(workers, every, every, load)


FITTED = [
    all_touched(4, load=0.1, counters=2),
    all_touched(20, load=0.4, counters=100),
    all_touched(10, load=0.7, counters=1000),
    all_touched(10, load=0.4, counters=300, labels=3),
    all_touched(40, load=0.7, counters=200, labels=0),
    all_touched(100, load=0.4, counters=400),
    all_touched(10, load=0.1, timers=20),
    all_touched(40, load=0.2, timers=20, bins=50),
    all_touched(10, load=0.4, timers=100),
    all_touched(4, load=0.2, timers=200, bins=300),
    all_touched(60, load=0.4, timers=60),
    all_touched(40, load=0.4, timers=40, bins=300),
    all_touched(10, load=0.7, histograms=100),
    all_touched(20, load=0.2, histograms=30, bins=80, labels=3),
    all_touched(80, load=0.4, histograms=50),
]
JOURNALS = [all_touched(100, counters=400), all_touched(60, timers=60)]
OTHERS = [
    all_touched(100, load=0.4, timers=100),
    Point(80, Shape(100, 20, 40), Shape(10, 2, 4), 0.5),
    all_touched(200, load=0.5, counters=300, timers=5),
    all_touched(30, load=0.3, counters=100, histograms=20, timers=40),
    all_touched(50, load=0.25, timers=60, bins=200, labels=2),
    all_touched(200, load=0.6, counters=40, timers=10, bins=120),
    all_touched(8, load=0.5, timers=400),
    all_touched(20, load=0.8, timers=20),
    all_touched(16, load=0.15, counters=1500, labels=2),
]

TOUCHED = [
    *(Shape(timers=count) for count in (1, 10, 50, 100, 200, 500, 2000)),
    *(Shape(counters=count) for count in (10, 100, 1000)),
    Shape(counters=50, timers=20),
]
SIZES = [Shape(counters=10), Shape(counters=50, timers=20), Shape(timers=200)]
ENDLESS = Point(1, Shape(timers=100_000), Shape(timers=100_000))


def found(fitted: list[Measured]) -> Laws:
    """Return the laws with the constants that fit best."""

    def law_of(terms: Any, what: Callable[[Measured], float], floor: float = 0.0) -> Law:
        return fit([(terms(one.point), what(one)) for one in fitted], floor)

    paces = [pace_of(one.busy * one.per_second + one.idle, one.used) for one in fitted]
    shapes = [Shape(c, 0, t) for c, t in ((1, 0), (100, 0), (1000, 0), (0, 10), (0, 100), (0, 300))]
    return Laws(
        idle=law_of(law.idle, lambda one: one.idle),
        journal=fit([(law.journal(point), journal_seconds(point)) for point in JOURNALS], 1e-3),
        update=law_of(law.update, lambda one: one.busy),
        pace=max(0.0, statistics.median(paces)),
        clean=law_of(law.clean_read, lambda one: one.clean),
        dirty=law_of(law.dirty_read, lambda one: one.dirty, 2e-3),
        memory=law_of(law.memory, lambda one: one.grown, 1e6),
        publication=fit([(law.publication(Point(1, s, s)), publish_seconds(s)) for s in shapes]),
    )  # fmt: skip


def most_workers(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits; every smaller number fits too."""
    number = 0
    for step in (2**power for power in range(16, -1, -1)):
        if fits(number + step):
            number += step
    return number


# The page.


def off(predicted: float, seen: float) -> str:
    return f"{(predicted / seen - 1) * 100:+.0f} %"


def checks(laws: Laws, points: list[Measured]) -> list[list[str]]:
    table = []
    for one in points:
        used = laws.used(one.point, one.per_second)
        dirty = laws.dirty.of(law.dirty_read(one.point))
        grown = laws.grown(one.point)
        each = one.per_second / one.point.workers
        table.append([
            str(one.point), f"{each:.2g}", f"{one.used * 100:.0f} %", off(used, one.used),
            off(laws.update.of(law.update(one.point)), one.busy),
            f"{(one.dirty + one.clean) * 1e3:.0f} ms",
            off(dirty + laws.clean.of(law.clean_read(one.point)), one.dirty + one.clean),
            f"{one.grown / 1e6:.1f} MB", off(grown, one.grown),
        ])  # fmt: skip
    return table


def sustained(laws: Laws) -> list[list[str]]:
    table = []
    for shape in TOUCHED:
        one = Point(1, shape, shape)
        per_second = laws.per_second(one)

        def is_in_time(workers: int, shape: Shape = shape) -> bool:
            return laws.read(Point(workers, shape, shape)) <= 1.0

        in_time = most_workers(is_in_time)
        table.append([
            str(one).partition(": ")[2],
            milliseconds(laws.publication.of(law.publication(one))), f"{per_second:.2g}",
            milliseconds(laws.update.of(law.update(one))), f"{workers_of(laws, shape):,}",
            f"{in_time:,}" if in_time < 10_000 else "> 10,000",
        ])  # fmt: skip
    return table


def short(laws: Laws) -> list[list[str]]:
    """Return what a worker of each size costs, for the head of the page."""
    table = []
    for shape in SIZES:
        one, two = Point(1, shape, shape), Point(2, shape, shape)
        spent = laws.per_second(one) * laws.publication.of(law.publication(one))
        table.append([
            str(one).partition(": ")[2], f"{workers_of(laws, shape):,}",
            f"{float(f'{(laws.grown(two) - laws.grown(one)) / 1e3:.2g}'):,.0f} KB", f"{spent * 100:.2g} %",
        ])  # fmt: skip
    return table


def workers_of(laws: Laws, shape: Shape) -> int:
    """Return how many workers fill a core that touch all of ``shape`` all the time."""
    per_second = laws.per_second(Point(1, shape, shape))

    def is_room(workers: int) -> bool:
        point = Point(workers, shape, shape)
        return laws.busy(point, workers * per_second) + laws.read(point) / READ_EVERY_SECONDS <= 1.0

    return most_workers(is_room)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def constants(one: Law, unit: float, text: str) -> list[list[str]]:
    return [[name, text.format(value / unit)] for name, value in one.constants.items()]


def model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


TEXT = """\
# How far one aggregator goes

How many workers can share an aggregator, how much memory it takes, and how much processor time? `make
scale` measures this in about three minutes and writes this page. This run: {python}, {cores} cores,
{model}.

## In short

{short}
- **Workers.** A service uses one aggregator, which uses one core at most. A worker touches a series when
  it records into it between two publications; series that it doesn't touch cost memory only.
- **Memory.** An empty aggregator takes {empty:.0f} MB. To this, add the memory per worker, and what all
  workers share (see [memory](#memory)).
- **Processor time.** A worker never uses more than a twenty-first of a core to publish, and never asks
  for more than {each:.2g} cores of the aggregator. In a test with real processes,
  {real}.

## How many workers

The more a worker touches, the less often it publishes: after a publication it waits {interval} s, or
{share} times as long as the publication took, whichever is longer. In this table, each worker touches
everything between two publications, and Prometheus reads every {every:.0f} s.

{sustained}
Two limits matter: the core of the aggregator, and the second that a reader waits. A read merges what was
touched since the read before it, so with many distributions the second limit is reached first.

## Memory

The aggregator grows by these bytes over an empty one. Multiply each line by its number and add them up:

{memory}
- *timer and worker* is one timer of one worker, and so on. *series* and *bin* count once per series,
  however many workers have it: they are the merged values, and room for the largest message and the
  largest answer.
- Each series has its name. A label has a name and a value of about ten letters.
- A bin is a range of values of a histogram or a timer. It takes twelve bytes: two for its key, two for
  its count (four from 65,536 on), and eight for its weight.

## The cost model

Every cost is a sum of lines: each constant times the number of what it stands for.

{second}
{update}
An update is large if it has more than {large} counters; a distribution is like {like} of them. A large
update outgrows the processor's cache and keeps Python's garbage collector busy, so each counter beyond
{large} costs that much more.

An aggregator that rests between updates spends more on each, because it wakes up to cold caches. If an
aggregator that is always busy would need the share *b* of a core, this one uses *b* · (1 + k) / (1 + *b*
· k), with k = {pace}.

{clean}
{dirty}
{journal}
The journal is written once a second while something changes, or for a tenth of the time if that is less.
A read is one for Prometheus. *series and worker* is a touched series times the workers that have it.

## Validation

The points below had no part in fitting the constants. The columns *model error* show how far
the model is off. Memory is off by {worst} % at most.

{checks}
## How it was measured

A real aggregator receives what real registries hold, over real sockets, from as many workers as a line
names. It decodes, applies and merges everything. All times are processor time of the aggregator, including
its 0MQ thread. Each is the least of several rounds, because neighbours on the machine can only add to it.
"""


def page(laws: Laws, others: list[Measured], real: tuple[float, float]) -> str:
    per_second, used = real
    point = Point(REAL_WORKERS, REAL_SHAPE, REAL_SHAPE)
    what = str(point).partition(": ")[2]
    grown = [abs(laws.grown(one.point) / one.grown - 1) for one in others]
    return TEXT.format(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        cores=os.cpu_count(),
        model=model(),
        short=markdown(
            ["each worker touches all the time", "workers per core of the aggregator",
             "memory of the aggregator per worker", "share of a core that a worker uses to publish"],
            short(laws),
        ),
        sustained=markdown(
            ["each worker touches", "a publication costs the worker", "publications per second",
             "an update costs the aggregator", "workers per core", "workers until a read takes 1 s"],
            sustained(laws),
        ),
        update=markdown(["an update costs", "µs"], constants(laws.update, 1e-6, "{:,.3g}")),
        journal=markdown(["a write of the journal costs", "µs"], constants(laws.journal, 1e-6, "{:,.3g}")),
        second=markdown(["every second costs", "µs"], constants(laws.idle, 1e-6, "{:,.3g}")),
        clean=markdown(["a read costs", "µs"], constants(laws.clean, 1e-6, "{:,.3g}")),
        dirty=markdown(["and for what was touched", "µs"], constants(laws.dirty, 1e-6, "{:,.3g}")),
        memory=markdown(["", "bytes"], constants(laws.memory, 1, "{:,.0f}")),
        pace=f"{laws.pace:.2f}",
        large=law.LARGE,
        share=SHARE,
        interval=INTERVAL_SECONDS,
        each=laws.per_second(ENDLESS) * laws.update.of(law.update(ENDLESS)),
        empty=statistics.median(one.empty for one in others) / 1e6 if others else 0.0,
        every=READ_EVERY_SECONDS,
        like=law.COUNTERS_A_DISTRIBUTION,
        checks=markdown(
            ["", "updates per second of a worker", "core used", "model error",
             "an update in bursts, model error", "a read", "model error", "memory", "model error"],
            checks(laws, others),
        ),
        worst=f"{max(grown) * 100:.0f}" if grown else "–",
        real=f"{REAL_WORKERS} workers with {what} each and {per_second:.0f} updates per second together used "
        f"{used * 100:.1f} % of a core; the model error is {off(laws.used(point, per_second), used)}",
    )  # fmt: skip


def main() -> None:
    began = time.monotonic()
    laws = found([logged(measure(point)) for point in FITTED])
    real = measure_real(REAL_WORKERS, REAL_SHAPE)
    others = [
        logged(measure(point, is_check=True)) for point in OTHERS if time.monotonic() - began < MAX_SECONDS
    ]
    text = page(laws, others, real)
    PAGE.write_text(text)
    sys.stdout.write(text)


def logged(one: Measured) -> Measured:
    text = f"{one.busy * 1e6:,.0f} µs an update, {one.grown / 1e6:.1f} MB"
    print(f"{one.point}: {text}", file=sys.stderr, flush=True)
    return one


if __name__ == "__main__":
    main()
