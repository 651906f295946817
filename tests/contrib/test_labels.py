"""Labels from the environment, in a service of several workers."""

from __future__ import annotations

import json
import pathlib
import re
import sys

from tests.contrib.services import Service
from tests.processes import free_port, get, running, wait_for


def workers_answered(service):
    """Send a request; return the number of workers that have had one."""
    get(service.port, "/")
    workers = json.loads(get(service.port, "/metrics")[2])["tapes"]["workers"]
    return workers['{state="live"}']["value"]


def test_all_workers_and_all_formats_show_the_labels_of_the_environment(short_dir):
    """Every series of three workers has the labels of TAPES_LABELS, in JSON and in Prometheus text."""
    service = Service(short_dir, ["-w", "3"], TAPES_LABELS="region=eu,service=shop")
    with service.running():
        service.wait_until_up()
        wait_for(lambda: workers_answered(service) == 3, "all workers are there")
        own = {"tapes", "tapes_"}
        tree = json.loads(get(service.port, "/metrics")[2])
        assert set(tree) > {"http", "tapes"}
        selectors = set(re.findall(r"{[^{}]*}", json.dumps(tree["http"]).replace('\\"', "'")))
        series = {selector for selector in selectors if "=" in selector}
        assert series
        assert all("region='eu'" in one and "service='shop'" in one for one in series)
        text = get(service.port, "/metrics", Accept="text/plain")[2].decode()
        samples = [line for line in text.splitlines() if not line.startswith(("#", *own))]
        assert len(samples) > 20
        assert all('region="eu"' in line and 'service="shop"' in line for line in samples)
    assert "TAPES_LABELS" not in service.output()


def test_labels_that_cannot_be_read_are_a_warning_and_no_fault(short_dir):
    """A service answers without labels that it cannot read; each worker logs that once."""
    service = Service(short_dir, ["-w", "2"], TAPES_LABELS="region")
    with service.running():
        service.wait_until_up()
        wait_for(lambda: workers_answered(service) == 2, "all workers are there")
    lines = [line for line in service.output().splitlines() if "TAPES_LABELS" in line]
    assert lines
    assert len(lines) <= 3
    assert all("got 'region', expected KEY=VALUE" in line for line in lines)


BY_AGENT = """
import tapes
from tapes.contrib.wsgi import TapesMiddleware

def app(environ, start_response):
    tapes.timer("seen", agent=environ["HTTP_USER_AGENT"]).update(0.25)
    start_response("200 OK", [])
    return [b"ok"]

app = TapesMiddleware(app)
"""
AGENTS = 2100


def test_two_thousand_agents_of_2_kb_as_labels_are_a_right_answer(home):
    """Label values are cut at 1,024 characters, and values beyond the maximum of series count together."""
    (home.directory / "app.py").write_text(BY_AGENT)
    port = free_port()
    gunicorn = str(pathlib.Path(sys.executable).with_name("gunicorn"))
    command = [gunicorn, "-w", "2", "-k", "gthread", "-b", f"127.0.0.1:{port}", "app:app"]
    with running(command, cwd=home.directory, **home.environment):
        wait_for(lambda: get(port, "/metrics")[0] == 200, "it is up")
        for number in range(AGENTS):
            headers = {"User-Agent": f"{'x' * 2000}{number}"}
            assert get(port, "/", **headers)[0] == 200

        def total(accept):
            status, _, body = get(port, "/metrics", Accept=accept)
            if status != 200:
                return None
            if accept == "application/json":
                seen = json.loads(body)["seen"]
                assert all(len(selector) <= 1024 + len('{agent=""}') for selector in seen)
                return len(seen), sum(series["count"] for series in seen.values())
            lines = [line for line in body.decode().splitlines() if line.startswith("seen_seconds_count{")]
            return len(lines), sum(int(line.split()[-1]) for line in lines)

        for accept in ("application/json", "text/plain;version=0.0.4", "application/openmetrics-text"):
            wait_for(lambda accept=accept: total(accept) == (2001, AGENTS), accept)
