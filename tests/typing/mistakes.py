"""Mistakes in calls of tapes, a line each; never run. Type checkers report the marked lines and no others."""

from __future__ import annotations

from typing import Any

import tapes
from tapes.contrib.wsgi import TapesMiddleware
from tapes.reporting.statsd import StatsdReporter

counter = tapes.counter("jobs.done", queue="mail")
timer = tapes.timer("job.duration")
registry = tapes.Registry(prefix="shop")
application: Any = None

tapes.conter("jobs.done")  # mistake
registry.conter("jobs.done")  # mistake
tapes.counter("jobs.done").inc()  # mistake
counter.incremnt()  # mistake
counter.set(3)  # mistake
counter.increment("1")  # mistake
counter.labels("mail")  # mistake
tapes.histogram("mail.size").observe(12)  # mistake
tapes.gauge("pool.size", merge="average")  # mistake
tapes.gauge("pool.size", 12)  # mistake
tapes.gauge("pool.size").value = 12  # mistake
tapes.counter("jobs.done", "How many jobs are done.")  # mistake
tapes.counter("jobs.done", ["queue"])  # mistake
tapes.counter("jobs.done", labels=["queue"])  # mistake
tapes.Counter("jobs.done", "How many jobs are done.")  # mistake
tapes.Registry("shop")  # mistake
tapes.get_stats().jobs.done.value.no
tapes.get_stats("jobs")  # mistake
tapes.get_stats() + 1  # mistake
StatsdReporter(10)  # mistake
TapesMiddleware(application, metric_path="/metrics")  # mistake
TapesMiddleware(application, exclude=5)  # mistake


@timer.time  # mistake
def forgot_the_parentheses() -> None:
    with timer.time:  # mistake
        pass


def right(metric: tapes.Counter, stats: tapes.Stats) -> float:
    metric.increment()
    seconds: float = stats.job.duration.q50 + stats["job"]["duration"].q99
    return seconds


right(counter, tapes.get_stats())
