"""How a number is taken: in one run, interleaved, as a ratio to what was measured beside it.

The speed of a shared machine drifts by half within minutes. So statements are visited in rounds, in shuffled
order, each for a slice of a few milliseconds; every slice has a slice of an empty method call beside it, and
what is kept is the ratio of the two. The figure is the median of the rounds. The loop's own cost is taken off
both. Nanoseconds are for reading: ratio × the run's median empty call.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Figure", "Statement", "latencies", "measure", "medians_of"]

SLICE_SECONDS = 0.008
BATCH = 1000


class Statement(NamedTuple):
    """What to time: code in terms of ``v``, a latency, and of the names in ``namespace``."""

    code: str
    namespace: dict[str, Any]


class Figure(NamedTuple):
    """A median: as a multiple of the empty call beside it, and in nanoseconds for reading."""

    empties: float
    nanoseconds: float


class _Empty:
    def call(self) -> None:
        pass


def latencies(count: int = BATCH, seed: int = 1) -> list[float]:
    """Return latencies in seconds: log-normal around 10 ms, from 1 µs to 10 s."""
    rng = random.Random(seed)
    return [min(10.0, max(1e-6, rng.lognormvariate(math.log(0.010), 1.6))) for _ in range(count)]


def _loop(statement: Statement) -> Callable[[int], float]:
    source = "def loop(batches, clock):\n start = clock()\n for batch in batches:\n  for v in batch:\n"
    body = "".join(f"   {line}\n" for line in statement.code.splitlines())
    namespace = dict(statement.namespace)
    exec(compile(source + body + " return clock() - start\n", "<benchmark>", "exec"), namespace)
    values = latencies()
    return lambda batches: namespace["loop"]([values] * batches, time.perf_counter)


class _Timed:
    def __init__(self, statement: Statement) -> None:
        self.loop = _loop(statement)
        self.batches = 1
        while self.loop(self.batches) < SLICE_SECONDS / 3 and self.batches < 4096:
            self.batches *= 2
        spent = self.loop(self.batches)
        self.batches = max(1, int(self.batches * SLICE_SECONDS / spent))

    def seconds(self) -> float:
        """Return the seconds that one run of the statement takes, with its share of the loop."""
        return self.loop(self.batches) / (self.batches * BATCH)


def measure(statements: dict[str, Statement], rounds: int = 15) -> dict[str, Figure]:
    """Return what each statement costs; see the module for how."""
    nothing = _Timed(Statement("pass", {}))
    empty_method = _Timed(Statement("o.call()", {"o": _Empty()}))
    timed = {name: _Timed(statement) for name, statement in statements.items()}
    ratios: dict[str, list[float]] = {name: [] for name in timed}
    empties = []
    for number in range(rounds):
        names = list(timed)
        random.Random(number).shuffle(names)
        for name in names:
            gc.collect()
            gc.disable()
            try:
                loop = nothing.seconds()
                base = empty_method.seconds() - loop
                cost = timed[name].seconds() - loop
            finally:
                gc.enable()
            empties.append(base)
            ratios[name].append(cost / base)
    nanoseconds = statistics.median(empties) * 1e9
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {name: Figure(value, value * nanoseconds) for name, value in medians.items()}


def medians_of(works: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Return the median seconds of works that take milliseconds each, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        names = list(works)
        random.Random(number).shuffle(names)
        for name in names:
            gc.collect()
            start = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
