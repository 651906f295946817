"""A real Prometheus scrapes four gunicorn workers under load, while each of them is replaced by a new one.

There is one run, and each claim about it is a test. The test knows all values that it sent, so what
Prometheus has in the end is compared for equality. Two jobs scrape the service once a second: one gets what
Prometheus requests, which is OpenMetrics, and the other one the text format.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

from tapes.exposition.prometheus import HISTOGRAM_BUCKETS, TIMER_BUCKETS
from tests.processes import Home, children, free_port, get, wait_for
from tests.real.prometheus import ALL, Client, Prometheus, bucket_counts, bucket_of, interpolated

SECONDS = int(os.environ.get("TAPES_PROMETHEUS_SECONDS", "10"))
PER_SECOND = 40
WORKERS = 4

pytestmark = [
    pytest.mark.needs("prometheus", "promtool"),
    pytest.mark.timeout(120 + 2 * SECONDS),
    pytest.mark.alone,  # Prometheus scrapes once a second, and no scrape may fail
]

APPLICATION = """
import tapes
from flask import Flask, request
from tapes.contrib.flask import Tapes

app = Flask(__name__)
Tapes(app)
sent = tapes.meter("parcels.sent")
size = tapes.histogram("parcel.size")
handling = tapes.timer("parcel.handling")
tapes.describe("parcel.size", "Sizes of parcels.", unit="bytes")

@app.get("/parcels/<carrier>")
def parcel(carrier):
    given = request.args
    tapes.counter("parcels.items", carrier=carrier).increment(int(given["items"]))
    sent.mark()
    size.update(float(given["size"]))
    handling.update(float(given["seconds"]))
    return "sent"
"""
ACCESS_LOG = "%(m)s|%(U)s|%(q)s|%(s)s|%(p)s|%({accept}i)s|%({content-type}o)s|%({user-agent}i)s"

FORMS = {"preferred": "", "text": "prometheus"}
"""The jobs, and the ``format`` that each requests."""

DISTRIBUTIONS = {"parcel_size_bytes": HISTOGRAM_BUCKETS, "parcel_handling_seconds": TIMER_BUCKETS}
QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
CARRIERS = ("bike", "ship", "train")


class Parcel(NamedTuple):
    """The values that one request makes the service record."""

    carrier: str
    items: int
    size: float
    seconds: float

    @property
    def path(self) -> str:
        # repr() of a float is parsed to the same float.
        return f"/parcels/{self.carrier}?items={self.items}&size={self.size!r}&seconds={self.seconds!r}"


def values_of(name: str, parcels: Sequence[Parcel]) -> list[float]:
    """Return the values that were sent for a distribution."""
    return [parcel.size if name == "parcel_size_bytes" else parcel.seconds for parcel in parcels]


def parcel(number: int, size: float, seconds: float) -> Parcel:
    return Parcel(CARRIERS[number % 3], 1 + number % 7, size, seconds)


def every_bucket() -> list[Parcel]:
    """Return sixty parcels with a value in each bucket, and each bound, which is in the bucket below."""
    sizes, times = (
        [*bounds, *((a + b) / 2 for a, b in itertools.pairwise(bounds)), bounds[-1] * 1.5]
        for bounds in (HISTOGRAM_BUCKETS, TIMER_BUCKETS)
    )
    return [parcel(i, sizes[i % len(sizes)], times[i % len(times)]) for i in range(60)]


def many(count: int) -> list[Parcel]:
    """Return parcels of skewed distributions, the same ones in every run."""
    source = random.Random(count)
    return [
        parcel(i, skewed(source, 180.0, 1.7, HISTOGRAM_BUCKETS), skewed(source, 0.08, 1.2, TIMER_BUCKETS))
        for i in range(count)
    ]


def skewed(source: random.Random, median: float, spread: float, bounds: Sequence[float]) -> float:
    """Return a value that is not just above a bound, where it may count as below (tapes.exposition)."""
    while True:
        value = source.lognormvariate(math.log(median), spread)
        if not any(bound < value <= 1.008 * bound for bound in bounds):
            return value


def series(name: str, **labels: str) -> str:
    """Return a series as a selector."""
    return name + "{" + ",".join(f'{label}="{labels[label]}"' for label in sorted(labels)) + "}"


def of_job(job: str, key: str) -> str:
    """Return the selector of a series of one job."""
    return key.replace("{", f'{{job="{job}",', 1)


def recorded(parcels: Sequence[Parcel]) -> dict[str, float]:
    """Return what the service has to show for these parcels, all of it exact."""
    route = {"method": "GET", "route": "/parcels/<carrier>", "status": "200"}
    found: dict[str, float] = {
        series("parcels_sent_total"): len(parcels),
        series("http_server_request_duration_seconds_count", **route): len(parcels),
        series("http_server_request_duration_seconds_bucket", **route, le="+Inf"): len(parcels),
    }
    for carrier in CARRIERS:
        items = sum(one.items for one in parcels if one.carrier == carrier)
        found[series("parcels_items_total", carrier=carrier)] = items
    for name, bounds in DISTRIBUTIONS.items():
        values = values_of(name, parcels)
        found[series(name + "_sum")] = math.fsum(values)
        found[series(name + "_count")] = len(values)
        for bound, count in zip([*map(float, bounds), "+Inf"], bucket_counts(values, bounds)):
            found[series(name + "_bucket", le=str(bound))] = count
    return found


class Service:
    """The application above in four sync workers."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.home = Home(directory)
        self.port = free_port()
        (directory / "parcels.py").write_text(APPLICATION)

    def running(self):
        return self.home.running(
            [
                str(pathlib.Path(sys.executable).with_name("gunicorn")), "-w", str(WORKERS),
                "-b", f"127.0.0.1:{self.port}", "--log-level", "warning",
                "--access-logfile", "access.log", "--access-logformat", ACCESS_LOG, "parcels:app",
            ]
        )  # fmt: skip

    def wait_until_up(self) -> None:
        """Wait until all workers have joined, which each of them does at its first request."""
        all_live = f'tapes_workers{{state="live"}} {WORKERS}\n'.encode()
        wait_for(lambda: all_live in get(self.port, "/metrics", Accept="text/plain")[2], "all are up", 60)

    def scrapes(self) -> list[list[str]]:
        """Return query, status, worker, accepted and answered format of each request of Prometheus."""
        log = (self.home.directory / "access.log").read_text().splitlines()
        lines = [line.split("|") for line in log]
        return [line[2:7] for line in lines if line[1] == "/metrics" and line[7].startswith("Prometheus/")]


class Run(NamedTuple):
    """What was sent and scraped, and the running programs.

    Attributes:
        few, parcels: What was sent first, and what was sent while workers were replaced.
        client: The client that sent ``parcels``.
        before, after: For each job, the time of a scrape before the first of them and of one after the last.
    """

    service: Service
    prometheus: Prometheus
    few: list[Parcel]
    parcels: list[Parcel]
    client: Client
    before: dict[str, int]
    after: dict[str, int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Send a few parcels, and many while all workers are replaced; Prometheus has scraped the last one."""
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as path:
        service = Service(pathlib.Path(path))
        prometheus = Prometheus(pathlib.Path(path, "prometheus"), service.port, FORMS)
        with service.running() as master:
            service.wait_until_up()
            with prometheus.running():
                prometheus.wait_until_up()
                yield drive(service, prometheus, master.pid)
        wait_for(service.home.nothing_left, "no process and no file is left")


def drive(service: Service, prometheus: Prometheus, master: int) -> Run:
    few, parcels = every_bucket(), many(SECONDS * PER_SECOND + 3)
    with Client(service.port, [one.path for one in few], PER_SECOND) as client:
        pass
    assert client.refused == []
    before = wait_until_scraped(prometheus, recorded(few))
    with Client(service.port, [one.path for one in parcels], PER_SECOND) as client:
        replace_all(master, client, len(parcels))
    assert client.refused == []
    after = wait_until_scraped(prometheus, recorded([*few, *parcels]))
    for job in FORMS:
        known = len(prometheus.scrapes(job))
        wait_for(lambda j=job, k=known: len(prometheus.scrapes(j)) >= k + 2, "it scrapes on", 30)
    return Run(service, prometheus, few, parcels, client, before, after)


def wait_until_scraped(prometheus: Prometheus, expected: dict[str, float]) -> dict[str, int]:
    """Wait until both jobs have scraped exactly this; return the time of each job's last scrape."""
    for job in FORMS:
        with contextlib.suppress(AssertionError):  # the next assertion shows more
            wait_for(lambda j=job: not differences(prometheus.now(j), expected), "all is scraped", 30)
        assert differences(prometheus.now(job), expected) == {}, job
    return {job: prometheus.scrapes(job)[-1] for job in FORMS}


def differences(found: dict[str, float], expected: dict[str, float]) -> dict[str, tuple[float | None, float]]:
    """Return found and expected values where they differ."""
    return {key: (found.get(key), value) for key, value in expected.items() if found.get(key) != value}


def replace_all(master: int, client: Client, requests: int) -> None:
    """Terminate one worker after the other while the client sends; gunicorn starts others."""
    workers = sorted(children(master))
    assert len(workers) == WORKERS
    for place, worker in enumerate(workers, 1):
        goal = requests * place // (WORKERS + 1)
        wait_for(lambda g=goal: len(client.answered) >= g, "requests are answered", 60 + SECONDS)
        os.kill(worker, signal.SIGTERM)
        wait_for(lambda w=worker: w not in children(master), "it has left", 30)
        wait_for(lambda: len(children(master)) == WORKERS, "another one has come", 30)


def test_counts_and_sums_are_exact(run):
    """Prometheus ends with the exact counters, counts, sums and buckets, in both formats, and keeps them."""
    expected = recorded([*run.few, *run.parcels])
    for job in FORMS:
        history = run.prometheus.history(job)
        for key, value in expected.items():
            late = [found for when, found in history[key] if when >= run.after[job]]
            assert len(late) >= 3, key
            assert set(late) == {value}, key


def test_no_scrape_fails_or_lacks_a_series(run):
    """While workers are replaced, every scrape succeeds with all series; Prometheus warns of nothing."""
    for job in FORMS:
        history = run.prometheus.history(job)
        scrapes = [when for when, _ in history[series("up")]]
        assert len(scrapes) > SECONDS / 2
        assert {up for _, up in history[series("up")]} == {1.0}
        for key in recorded(run.few):
            first = history[key][0][0]
            assert first <= run.before[job], key
            assert [when for when, _ in history[key]] == [when for when in scrapes if when >= first], key
    assert run.prometheus.output() == ""


def test_nothing_that_counts_ever_decreases(run):
    """No count of the application or of tapes itself decreases while all workers are replaced."""
    for job in FORMS:
        counting = f'{{job="{job}",__name__=~".+_(total|count|sum|bucket)"}}'
        names = {one["metric"]["__name__"] for one in run.prometheus.query(counting)}
        assert {key.partition("{")[0] for key in recorded(run.few)} | {"tapes_messages_total"} <= names
        for name in sorted(names):
            decreases = run.prometheus.value(f'max(resets({name}{{job="{job}"}}{ALL}))')
            assert decreases == 0, name
        retired = run.prometheus.value(series("tapes_workers", job=job, state="retired"))
        assert retired == WORKERS


def test_every_scrape_is_up_to_date(run):
    """No scrape has events that were not sent yet, and most have all events of half a second before.

    The time of a scrape is that of its start, moved by at most 2 ms to keep the interval even, and cut to
    whole milliseconds. Its values are those of its end. A busy machine may delay the publishing thread, so
    some scrapes may be later than the half second that tapes promises, by seconds.
    """
    started, answered = sorted(run.client.started), sorted(run.client.answered)
    for job in FORMS:
        history = run.prometheus.history(job)
        duration = dict(history[series("scrape_duration_seconds")])
        seen = {when: count - len(run.few) for when, count in history[series("parcels_sent_total")]}
        during = [when for when in seen if started[0] < when < answered[-1]]
        assert len(during) > SECONDS / 2
        for when in during:
            assert seen[when] <= bisect_right(started, when + 1000 * duration[when] + 3)
            assert seen[when] >= bisect_right(answered, when - 5000)
        late = [when for when in during if seen[when] < bisect_right(answered, when - 500)]
        assert len(late) <= len(during) / 2


def test_rates_are_what_was_sent(run):
    """``rate()`` and ``increase()`` of each counter, count, sum and bucket over the load equal what was sent.

    Prometheus takes the first and the last sample of a range, divides by the time between them, and
    extrapolates to the ends of the range if these are no further away than the next sample would be. So over
    ``[s]`` an increase of ``d`` between samples ``t`` apart is ``d·s/t``, and its rate ``d/t``. Nothing was
    sent when either sample was taken, hence ``d`` is known. The range begins 1 ms before the first sample,
    because versions differ in whether a range includes its beginning.
    """
    few, everything = recorded(run.few), recorded([*run.few, *run.parcels])
    for job in FORMS:
        apart = run.after[job] - run.before[job]
        for key in everything:
            sent = everything[key] - few[key]
            over = f"{of_job(job, key)}[{apart + 1}ms]"
            rate = run.prometheus.value(f"rate({over})", run.after[job])
            assert rate == pytest.approx(sent / apart * 1000, rel=1e-9), key
            increase = run.prometheus.value(f"increase({over})", run.after[job])
            assert increase == pytest.approx(sent * (apart + 1) / apart, rel=1e-9), key


@pytest.mark.parametrize("q", QUANTILES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quantiles_are_in_their_buckets(run, name, q):
    """``histogram_quantile``, over the lifetime and the load, follows from the sent values' buckets."""
    for job in FORMS:
        buckets = of_job(job, series(name + "_bucket"))
        window = f"[{run.after[job] - run.before[job] + 1}ms]"
        for expression, parcels in (
            (buckets, [*run.few, *run.parcels]),
            (f"sum by (le) (rate({buckets}{window}))", run.parcels),
        ):
            found = run.prometheus.value(f"histogram_quantile({q}, {expression})", run.after[job])
            assert_quantile(found, q, values_of(name, parcels), DISTRIBUTIONS[name])


def assert_quantile(found: float, q: float, values: list[float], bounds: Sequence[float]) -> None:
    assert found == pytest.approx(interpolated(q, bucket_counts(values, bounds), bounds), rel=1e-9)
    true = sorted(values)[math.ceil(q * len(values)) - 1]
    low, high = bucket_of(true, bounds)
    assert found == low if high == math.inf else low < found <= high


def test_prometheus_gets_the_format_that_it_requests(run):
    """Prometheus gets OpenMetrics, which it prefers, or the text format if the address requests it."""
    forms, workers = defaultdict(set), set()
    for query, status, worker, accepted, answered in run.service.scrapes():
        assert accepted.startswith("application/openmetrics-text")
        forms[query].add((status, answered))
        workers.add(worker)
    assert forms == {
        "": {("200", "application/openmetrics-text; version=1.0.0; charset=utf-8")},
        "format=prometheus": {("200", "text/plain; version=0.0.4; charset=utf-8")},
    }
    assert len(workers) > 1


def test_promtool_reports_no_problem(run):
    """promtool reports no problem in the text format."""
    status, headers, text = get(run.service.port, "/metrics", Accept="text/plain")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert all(name.encode() + b"_bucket{" in text for name in DISTRIBUTIONS)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
