"""uWSGI forks in C, with and without Python threads; every worker answers for all of them."""

from __future__ import annotations

import json
import pathlib
import signal
import sys

import pytest

from tests.contrib.services import Load
from tests.processes import free_port, get, mentions, running, wait_for

UWSGI = str(pathlib.Path(sys.executable).with_name("uwsgi"))

APPLICATION = """
import tapes
import tapes.contrib.uwsgi
from flask import Flask
from tapes.contrib.flask import TapesMiddleware

tapes.counter("seven").increment(7)
app = Flask(__name__)
app.wsgi_app = TapesMiddleware(app.wsgi_app)

@app.get("/")
def index():
    return "here"
"""

MODES = {
    "no threads": [],
    "threads": ["--enable-threads"],
    "lazy": ["--lazy-apps"],
    "lazy, threads": ["--lazy-apps", "--threads", "2"],
}

pytestmark = pytest.mark.needs(UWSGI)


class Service:
    """The application above under uWSGI with three workers."""

    def __init__(self, directory: pathlib.Path, *arguments: str) -> None:
        self.directory = directory
        self.private = directory / "tmp"
        self.private.mkdir()
        self.port = free_port()
        (directory / "shop.py").write_text(APPLICATION)
        self.fifo = directory / "fifo"
        self.command = [
            UWSGI, "--http-socket", f"127.0.0.1:{self.port}", "--master", "--processes", "3",
            "--virtualenv", sys.prefix, "--module", "shop:app", "--die-on-term", "--disable-logging",
            "--master-fifo", str(self.fifo), "--worker-reload-mercy", "5", *arguments,
        ]  # fmt: skip
        self.environment = {"TMPDIR": str(self.private), "XDG_RUNTIME_DIR": str(self.private)}

    def running(self):
        return running(self.command, cwd=self.directory, **self.environment)

    def wait_until_up(self) -> None:
        wait_for(lambda: get(self.port, "/metrics"), "uWSGI is up")

    def stats(self):
        return json.loads(get(self.port, "/metrics")[2])

    def workers(self, state: str) -> int:
        return self.stats()["tapes"]["workers"][f'{{state="{state}"}}']["value"]

    def are_up(self, imports: int) -> bool:
        """Return whether three workers run, and the application was imported ``imports`` times in all."""
        return self.workers("live") == 3 and self.stats().get("seven", {}).get("value") == 7 * imports

    def counted(self) -> int:
        timers = self.stats()["http"]["server"].get("request", {}).get("duration", {})
        return timers.get('{method="GET",route="/",status="200"}', {}).get("count", 0)

    def nothing_left(self) -> bool:
        return not mentions(str(self.directory)) and not list(self.private.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_reloads_under_load_count_exactly(short_dir, mode):
    """Requests and events from import count once over reloads by SIGHUP and by uWSGI's fifo."""
    service = Service(short_dir, *MODES[mode])
    imports = 3 if "lazy" in mode else 1
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, "/") as load:
            load.wait_for_requests()
            wait_for(lambda: service.are_up(imports), "all workers are up")
            for number, reload in enumerate((lambda: process.send_signal(signal.SIGHUP),
                                             lambda: service.fifo.write_text("r")), 1):  # fmt: skip
                reload()
                wait_for(lambda n=3 * number: service.workers("retired") == n, "the old workers leave")
                wait_for(lambda n=number + 1: service.are_up(n * imports), "there are new ones")
                load.wait_for_requests()
        # Without a thread, uWSGI may end a worker without a hook before its last request is published.
        on_their_way = 0 if mode == "threads" else 8
        wait_for(lambda: service.counted() >= load.answered - on_their_way, f"{load.answered} are counted")
        assert service.counted() <= load.sent
        assert service.are_up(3 * imports)  # events from import are counted too
        process.terminate()
        process.wait(10)
    wait_for(service.nothing_left, "nothing is left")


@pytest.mark.parametrize("mode", ["no threads", "lazy, threads"])
def test_uwsgi_without_a_master_counts_its_requests(short_dir, mode):
    """uWSGI without a master counts its requests and leaves nothing."""
    service = Service(short_dir, *MODES[mode])
    service.command.remove("--master")
    with service.running() as process:
        service.wait_until_up()
        for _ in range(5):
            assert get(service.port, "/")[2] == b"here"
        wait_for(lambda: service.counted() == 5, "all requests are counted")
        process.send_signal(signal.SIGINT)
        process.wait(10)
    wait_for(service.nothing_left, "nothing is left")


@pytest.mark.parametrize("mode", MODES)
def test_requests_of_recycled_workers_count_exactly(short_dir, mode):
    """Requests over recycled uWSGI workers count exactly, all workers agree, and nothing is left."""
    service = Service(short_dir, "--max-requests", "100", *MODES[mode])
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, "/") as load:
            load.wait_for_requests(2000)
        assert load.answered == load.sent
        wait_for(lambda: service.counted() == load.answered, f"{load.answered} are counted")
        assert [service.counted() for _ in range(12)] == [load.answered] * 12
        process.terminate()
        process.wait(10)
    wait_for(service.nothing_left, "nothing is left")


REPORTING = """
import os, datetime, tapes
from tapes.reporting import ScheduledReporter

class Noting(ScheduledReporter):
    def report(self):
        with open("reports", "a") as file:
            file.write(f"{os.getpid()} {self.registry.get_stats().n.value}\\n")

for number in range(300):  # so that the first report takes long
    tapes.timer("t", number=number).update(1)
tapes.counter("n").increment(5)
Noting(datetime.timedelta(milliseconds=50)).start()

def application(environ, start_response):
    tapes.counter("n").increment()
    start_response("200 OK", [])
    return [b"%d" % os.getpid()]
"""


@pytest.mark.parametrize("mode", [["--enable-threads"], ["--enable-threads", "--lazy-apps"], []])
def test_a_reporter_that_is_started_at_import_reports_in_every_worker(short_dir, mode):
    """A reporter started before uWSGI forks reports in every worker, by a thread of its own."""
    service = Service(short_dir, *mode)
    (short_dir / "shop.py").write_text(REPORTING.replace("application", "app"))
    reports = short_dir / "reports"

    def reported():
        lines = reports.read_text().split("\n")[:-1]
        return {pid: int(value) for pid, value in map(str.split, lines)}

    with service.running():
        pids = [wait_for(lambda: get(service.port, "/"), "uWSGI is up")[2].decode() for _ in range(20)]
        if mode:  # without Python threads, a thread runs only during a request
            wait_for(
                lambda: sum(reported().values()) == 5 * len(reported()) + 20 and len(reported()) == 3,
                "every worker has reported",
            )
        assert set(pids) <= set(map(str, mentions(str(short_dir))))
