"""A real Prometheus that scrapes loopback once a second, its arithmetic, and a client that keeps a log."""

from __future__ import annotations

import bisect
import json
import math
import pathlib
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from tests.processes import free_port, get, running, wait_for

ALL = "[1h]"
"""A range that begins before the start of any test."""

Samples = list[tuple[int, float]]
"""Times in whole milliseconds, as Prometheus keeps them, and values."""


class Prometheus:
    """A Prometheus with one job for each query string, all of them for ``/metrics`` of one port."""

    def __init__(self, directory: pathlib.Path, target: int, jobs: dict[str, str]) -> None:
        self.directory = directory
        self.jobs = list(jobs)
        self.port = free_port()
        directory.mkdir()
        (directory / "prometheus.yml").write_text(json.dumps(_configuration(target, jobs)))  # JSON is YAML

    def running(self):
        command = [
            "prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]  # fmt: skip
        return running(command, cwd=self.directory)

    def wait_until_up(self) -> None:
        wait_for(lambda: get(self.port, "/-/ready")[0] == 200, "Prometheus is ready", 30)

    def output(self) -> str:
        """Return the warnings and errors that it logged."""
        return (self.directory / "output.log").read_text(errors="replace")

    def query(self, expression: str, at: int | None = None) -> list[dict[str, Any]]:
        """Return the result of an expression, as of a time in milliseconds, or now."""
        asked = {"query": expression} if at is None else {"query": expression, "time": f"{at / 1000:.3f}"}
        status, _, body = get(self.port, "/api/v1/query?" + urlencode(asked))
        answer = json.loads(body)
        assert (status, answer["status"]) == (200, "success"), (expression, answer)
        return answer["data"]["result"]

    def value(self, expression: str, at: int | None = None) -> float | None:
        """Return the value of an expression's only series, or ``None`` if there is no series yet."""
        result = self.query(expression, at)
        assert len(result) < 2, (expression, result)
        return float(result[0]["value"][1]) if result else None

    def now(self, job: str) -> dict[str, float]:
        """Return the last value of each series that a job scraped."""
        found = self.query(f'{{job="{job}"}}')
        return {_key(series["metric"]): float(series["value"][1]) for series in found}

    def history(self, job: str) -> dict[str, Samples]:
        """Return all samples that a job scraped, by series."""
        found = self.query(f'{{job="{job}"}}{ALL}')
        return {
            _key(series["metric"]): [(round(when * 1000), float(value)) for when, value in series["values"]]
            for series in found
        }

    def scrapes(self, job: str) -> list[int]:
        """Return the times at which a job scraped."""
        found = self.query(f'up{{job="{job}"}}{ALL}')
        return [round(when * 1000) for series in found for when, _ in series["values"]]


def _key(metric: dict[str, str]) -> str:
    """Return a series as a selector, without the labels that Prometheus adds."""
    labels = sorted(metric.keys() - {"__name__", "job", "instance"})
    return metric["__name__"] + "{" + ",".join(f'{label}="{metric[label]}"' for label in labels) + "}"


def _configuration(target: int, jobs: dict[str, str]) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {
                "job_name": job,
                "params": {"format": [form]} if form else {},
                "static_configs": [{"targets": [f"127.0.0.1:{target}"]}],
            }
            for job, form in jobs.items()
        ],
    }


class Client:
    """Sends requests at a steady pace, each on a connection of its own, and logs them. A late request is
    caught up.

    Attributes:
        started, answered: The times before a request was sent and after its answer had arrived, in
            milliseconds of the clock that Prometheus reads too.
        refused: The paths that got another answer than 200, with that answer or the exception.
    """

    def __init__(self, port: int, paths: Sequence[str], per_second: float, clients: int = 4) -> None:
        self.started: list[float] = []
        self.answered: list[float] = []
        self.refused: list[tuple[str, object]] = []
        self._port = port
        self._todo = ((number / per_second, path) for number, path in enumerate(paths))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send_all) for _ in range(clients)]

    def __enter__(self) -> Client:
        self._begin = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send_all(self) -> None:
        while True:
            with self._lock:
                due, path = next(self._todo, (0.0, None))
            if path is None or self._stop.wait(max(0.0, self._begin + due - time.monotonic())):
                return
            self.started.append(time.time() * 1000)
            try:
                outcome: object = get(self._port, path)[0]
            except Exception as error:
                outcome = error
            self.answered.append(time.time() * 1000)
            if outcome != 200:
                self.refused.append((path, outcome))


def bucket_counts(values: Sequence[float], bounds: Sequence[float]) -> list[int]:
    """Return how many values are at or below each bound, and how many values there are."""
    ordered = sorted(values)
    return [bisect.bisect_right(ordered, bound) for bound in bounds] + [len(ordered)]


def bucket_of(value: float, bounds: Sequence[float]) -> tuple[float, float]:
    """Return the bounds of a value's bucket; the upper bound belongs to the bucket."""
    edges = [-math.inf, *bounds, math.inf]
    place = bisect.bisect_left(edges, value)
    return edges[place - 1], edges[place]


def interpolated(q: float, counts: Sequence[float], bounds: Sequence[float]) -> float:
    """Return the result of ``histogram_quantile`` for cumulative counts, whose last one is that of +Inf.

    The rank of a quantile is ``q`` times the number of values. The first bucket that reaches the rank has the
    quantile, and its values are assumed to be spread evenly between its bounds. The lower bound of the first
    bucket is 0, unless its upper bound is at most 0, in which case the answer is that bound. Beyond the last
    bound the answer is the last bound.
    """
    rank = q * counts[-1]
    place = bisect.bisect_left(counts, rank)
    if place >= len(bounds):
        return bounds[-1]
    if place == 0 and bounds[0] <= 0:
        return bounds[0]
    low, below = (bounds[place - 1], counts[place - 1]) if place else (0.0, 0.0)
    return low + (bounds[place] - low) * (rank - below) / (counts[place] - below)
