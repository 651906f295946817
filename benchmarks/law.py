"""The law by which an aggregator's cost grows: constants times what there is, found by least squares.

Every line of the law is a sum of constants times numbers that are known before anything runs (workers,
series, bins). The constants are those with the least relative errors over the points that were measured for
it, and none of them is negative. Other points, which had no part in it, say how far the law can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
from load import Shape

__all__ = [
    "COUNTERS_A_DISTRIBUTION", "INTERVAL_SECONDS", "LARGE", "SHARE", "Law", "Laws", "Point", "clean_read",
    "dirty_read", "fit", "idle", "journal", "memory", "pace_of", "publication", "update",
]  # fmt: skip

LARGE, COUNTERS_A_DISTRIBUTION = 200, 8
"""An update of more counters outgrows the processor's cache, and Python's garbage collector passes over it
while it is being read; a distribution is like so many counters. What is beyond that costs more.
"""

INTERVAL_SECONDS, SHARE = 0.1, 20
"""A publisher's: it waits so long, or so many times as long as the publication took."""
JOURNAL_SECONDS, JOURNAL_SHARE = 1.0, 9
"""The journal's likewise."""

Terms = dict[str, float]


class Point(NamedTuple):
    """So many workers with the series of ``shape``, of which an update brings ``touched``, all by default."""

    workers: int
    shape: Shape
    touched: Shape
    load: float = 0.4

    def __str__(self) -> str:
        shape = self.shape
        kinds = zip(("counters", "histograms", "timers"), shape, self.touched)
        parts = [
            f"{n:,} {kind if n > 1 else kind[:-1]}" + (f" ({k} touched)" if k < n else "")
            for kind, n, k in kinds
            if n
        ]
        text = f"{self.workers} workers: {', '.join(parts)}"
        if shape.distributions:
            text += f" of {shape.bins} bins"
        return text + ("" if shape.labels == 1 else f", {shape.labels} labels")


def _kinds(shape: Shape, times: float = 1.0) -> Terms:
    return {
        "counter": times * shape.counters,
        "histogram": times * shape.histograms,
        "timer": times * shape.timers,
        "bin": times * shape.distributions * shape.bins,
        "label": times * shape.series * shape.labels,
    }


def idle(point: Point) -> Terms:
    """What a second costs the aggregator in which nothing happens."""
    return {"second": 1.0, "worker": 1.0 * point.workers}


def publication(point: Point) -> Terms:
    """What an update costs the worker that sends it."""
    touched = point.touched
    return {"update": 1.0, "counter": 1.0 * touched.counters, "distribution": 1.0 * touched.distributions}


def update(point: Point) -> Terms:
    """What an update costs an aggregator that is always busy."""
    touched = point.touched
    size = touched.counters + COUNTERS_A_DISTRIBUTION * touched.distributions
    beyond = max(0.0, 1.0 - LARGE / size) if size else 0.0
    return {
        "update": 1.0,
        **_kinds(touched),
        "counter of a large update": beyond * touched.counters,
        "distribution of a large update": beyond * touched.distributions,
    }


def journal(point: Point) -> Terms:
    """What it costs to write down all that is known, once."""
    terms = _merged_kinds(point.shape, point.workers)
    return {what: terms[what] for what in ("series and worker", "bin and worker")}


def clean_read(point: Point) -> Terms:
    """What it costs to write everything for Prometheus, if nothing was touched since the last time."""
    shape = point.shape
    return {
        "read": 1.0,
        "worker": 1.0 * point.workers,
        "name": 1.0 * shape.names,
        "counter": 1.0 * shape.counters,
        "distribution": 1.0 * shape.distributions,
        "bin": 1.0 * shape.distributions * shape.bins,
    }


def dirty_read(point: Point) -> Terms:
    """What it costs beyond that to merge what was touched since."""
    return {"series": 1.0 * point.touched.series, **_merged_kinds(point.touched, point.workers)}


def _merged_kinds(shape: Shape, workers: int) -> Terms:
    return {
        "series and worker": 1.0 * workers * shape.series,
        "distribution and worker": 1.0 * workers * shape.distributions,
        "bin and worker": 1.0 * workers * shape.distributions * shape.bins,
    }


def memory(point: Point) -> Terms:
    """How many bytes the aggregator grows by."""
    each = {f"{what} and worker": number for what, number in _kinds(point.shape, point.workers).items()}
    bins = 1.0 * point.shape.distributions * point.shape.bins
    return {
        "start": 1.0,
        "worker": 1.0 * point.workers,
        **each,
        "series": 1.0 * point.shape.series,
        "bin": bins,
    }


class Law(NamedTuple):
    """Constants by name."""

    constants: dict[str, float]

    def of(self, terms: Terms) -> float:
        return sum(self.constants[name] * number for name, number in terms.items())


def fit(measured: Sequence[tuple[Terms, float]], floor: float = 0.0) -> Law:
    """Return the law with the least relative errors; what is below ``floor`` weighs as if it were that."""
    names = list(measured[0][0])
    while True:
        rows = [[terms[name] / max(value, floor) for name in names] for terms, value in measured]
        goal = [value / max(value, floor) for _, value in measured]
        solution, *_ = numpy.linalg.lstsq(numpy.array(rows), numpy.array(goal), rcond=None)
        constants = dict(zip(names, map(float, solution)))
        worst = min(constants, key=lambda name: constants[name])
        if constants[worst] >= 0.0:
            return Law({name: constants.get(name, 0.0) for name in measured[0][0]})
        names.remove(worst)


def pace_of(busy: float, used: float) -> float:
    """Return how much more an aggregator spends that rests in between, from one that was seen.

    Args:
        busy: The share of its time that it would need if it were always busy.
        used: The share that it used.
    """
    return (used - busy) / (busy * (1.0 - used))


def used_of(busy: float, pace: float) -> float:
    """Return what share of its time an aggregator uses; the inverse of `pace_of`."""
    return busy * (1.0 + pace) / (1.0 + busy * pace)


class Laws(NamedTuple):
    """A law for each cost; ``pace`` is how much more an update costs an aggregator that rests in between."""

    idle: Law
    journal: Law
    update: Law
    pace: float
    clean: Law
    dirty: Law
    memory: Law
    publication: Law

    def busy(self, point: Point, per_second: float) -> float:
        """Return the share of a core that updates take, and the journal, if it is always busy."""
        writing = self.journal.of(journal(point))
        written = writing / (writing + max(JOURNAL_SECONDS, JOURNAL_SHARE * writing))
        return self.idle.of(idle(point)) + per_second * self.update.of(update(point)) + written

    def used(self, point: Point, per_second: float) -> float:
        return used_of(self.busy(point, per_second), self.pace)

    def read(self, point: Point) -> float:
        """Return what a read costs after everything was touched."""
        return self.clean.of(clean_read(point)) + self.dirty.of(dirty_read(point))

    def grown(self, point: Point) -> float:
        return self.memory.of(memory(point))

    def per_second(self, point: Point) -> float:
        """Return how often a worker publishes that touches all this all the time."""
        seconds = self.publication.of(publication(point))
        return 1.0 / (seconds + max(INTERVAL_SECONDS, SHARE * seconds))
