"""A real Prometheus scrapes two gunicorn workers under load, while their aggregator is killed twice."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from bisect import bisect_right

import pytest

from tests.distributed import crashing
from tests.processes import Home, free_port, get, wait_for
from tests.real.prometheus import ALL, Client, Prometheus

SECONDS = 10
PER_SECOND = 40
REQUESTS = SECONDS * PER_SECOND

pytestmark = [pytest.mark.needs("prometheus"), pytest.mark.alone]  # it scrapes once a second

APPLICATION = """
import tapes
from flask import Flask
from tapes.contrib.flask import Tapes

app = Flask(__name__)
Tapes(app)

@app.get("/hit")
def hit():
    tapes.counter("hits").increment()
    tapes.meter("hits.metered").mark()
    tapes.histogram("size").update(100)
    with tapes.timer("handling").time():
        return "hit"
"""

COUNTS = ("hits_total", "hits_metered_total", "size_count", "handling_seconds_count")
BEGIN_ANEW = {"tapes_messages_total", "tapes_publish_lag_seconds"}
"""Metrics of the aggregator, which start from zero with each aggregator."""


def test_prometheus_sees_no_reset_and_no_spike(short_dir):
    """Over two kills Prometheus sees no decrease and no rate above what was sent; the end is exact."""
    home = Home(short_dir)
    (short_dir / "hits.py").write_text(APPLICATION)
    port, own_port = free_port(), free_port()
    prometheus = Prometheus(short_dir / "prometheus", port, {"workers": ""})
    command = [
        str(pathlib.Path(sys.executable).with_name("gunicorn")), "-w", "2", "-b", f"127.0.0.1:{port}",
        "--log-level", "warning", "-c", "python:tapes.contrib.gunicorn_conf", "hits:app",
    ]  # fmt: skip
    with home.running(command, TAPES_HTTP=str(own_port)), prometheus.running():
        wait_for(lambda: get(port, "/metrics")[0] == 200, "gunicorn is up", 20)
        prometheus.wait_until_up()
        (service,) = home.services()
        lock = service / "metrics.ipc.lock"
        killed: list[int] = [0]
        with Client(port, ["/hit"] * REQUESTS, PER_SECOND) as client:
            for place in (1, 2):
                goal = REQUESTS * place // 3
                wait_for(lambda g=goal: len(client.answered) >= g, "requests are answered", 60)
                wait_for(lambda: crashing.aggregator(lock) not in killed, "there is another aggregator")
                killed.append(crashing.aggregator(lock))
                os.kill(killed[-1], signal.SIGKILL)
        assert client.refused == []
        for name in COUNTS:
            wait_for(lambda n=name: last(prometheus, n) == REQUESTS, f"the end of {name} is exact", 10)
        scrapes = prometheus.scrapes("workers")
        wait_for(lambda: len(prometheus.scrapes("workers")) >= len(scrapes) + 2, "it scrapes on", 10)
        assert_no_resets(prometheus)
        assert_rates_follow_the_load(prometheus, client)
        assert f"hits_total {REQUESTS}\n" in get(own_port, "/metrics", Accept="text/plain")[2].decode()
    wait_for(home.nothing_left, "nothing is left")
    assert "tapes can't" not in (short_dir / "output.log").read_text()


def last(prometheus: Prometheus, name: str) -> float | None:
    """Return the last value of a series of the application."""
    return prometheus.value(f'{name}{{job="workers"}}')


def assert_no_resets(prometheus: Prometheus) -> None:
    """Assert that no count decreased, except those that start anew with each aggregator."""
    for found in prometheus.query(f'{{job="workers",__name__=~".+_(total|count|sum|bucket)"}}{ALL}'):
        name = found["metric"]["__name__"]
        if not name.startswith(tuple(BEGIN_ANEW)):
            values = [float(value) for _, value in found["values"]]
            assert values == sorted(values), found["metric"]
    for name in COUNTS:
        assert prometheus.value(f'resets({name}{{job="workers"}}{ALL})') == 0


def assert_rates_follow_the_load(prometheus: Prometheus, client: Client) -> None:
    """Assert that no sample is ahead of what was sent, and no 5 s rate above it, except for scrape noise.

    A sample has the time at which its scrape began and the value of its end. The end is up to a second later
    if the aggregator was killed meanwhile.
    """
    started = sorted(client.started)
    fastest = max(bisect_right(started, when + 5000) - place for place, when in enumerate(started)) / 5
    history = prometheus.history("workers")
    duration = dict(history["scrape_duration_seconds{}"])
    for name in COUNTS:
        samples = history[name + "{}"]
        assert len(samples) > SECONDS / 2
        for when, value in samples:
            assert value <= bisect_right(started, when + 1000 * duration[when] + 3), (name, when)
        rate = f'rate({name}{{job="workers"}}[5s])'
        most = prometheus.value(f"max_over_time({rate}[1m:250ms])")
        print(f"{name}: at most {most:.1f} a second, of {fastest:.1f}")
        assert fastest / 2 < most <= 1.5 * fastest
    failed = sum(up == 0 for _, up in history["up{}"])
    print(f"{failed} of {len(duration)} scrapes failed")
    assert failed <= 4 < len(duration)
