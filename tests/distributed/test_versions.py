"""Workers of two releases at once: a newer release replaces an older aggregator, and nothing is lost."""

from __future__ import annotations

import collections
import http.client
import json
import pathlib
import re
import shutil
import signal
import sys

import pytest

from tapes.distributed.protocol.wire import VERSION
from tests.distributed import crashing
from tests.processes import ROOT, Clients, children, free_port, get, wait_for

WORKERS = 3
LEVEL = 5

APPLICATION = f"""
import pathlib
import tapes
from flask import Flask
from tapes.contrib.flask import Tapes
from tapes.distributed.protocol.wire import VERSION

newer = pathlib.Path("newer").read_text() == str(VERSION)
turn = pathlib.Path("turn").read_text()
app = Flask(__name__)
Tapes(app)
tapes.gauge("level", merge="max" if newer else "sum").set({LEVEL})

@app.get("/hit")
def hit():
    tapes.timer("t").update(0.5)
    if newer:
        tapes.meter("changed").mark()
    else:
        tapes.counter("changed").increment()
    return turn
"""


def release(directory: pathlib.Path, version: int) -> pathlib.Path:
    """Return the directory of a release with this ``version`` of the wire format; create it if needed."""
    path = directory / f"release-{version}"
    if not path.exists():
        shutil.copytree(ROOT / "tapes", path / "tapes", ignore=shutil.ignore_patterns("__pycache__"))
        wire = path / "tapes" / "distributed" / "protocol" / "wire.py"
        text, changed = re.subn(r"(?m)^VERSION = \d+$", f"VERSION = {version}", wire.read_text())
        assert changed == 1
        wire.write_text(text)
    return path


class Hits(Clients):
    """Clients that send requests until they are stopped, and count the answers by their content.

    ``before`` are earlier clients, whose counts these continue.
    """

    def __init__(self, port: int, before: Hits | None = None) -> None:
        super().__init__(3)
        self.answered: collections.Counter[str] = before.answered if before else collections.Counter()
        self.failed: list[object] = []
        self._port = port

    def wait_for_requests(self, turn: str, requests: int = 100) -> None:
        """Return when workers of that turn have answered ``requests`` more requests."""
        goal = self.answered[turn] + requests
        wait_for(lambda: self.answered[turn] >= goal, f"requests are answered by {turn}", 20)

    def _request(self) -> None:
        while not self._stop.wait(0.005):
            try:
                status, _, body = get(self._port, "/hit")
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, repr(error).encode()
            with self._lock:
                if status == 200:
                    self.answered[body.decode()] += 1
                else:
                    self.failed.append((status, body))


class Rolling:
    """gunicorn whose workers import the release that is current when they start; the master imports none."""

    def __init__(self, home, older: int, newer: int) -> None:
        self.home = home
        self.port = free_port()
        self.older, self.newer = older, newer
        self._current = home.directory / "current"
        (home.directory / "app.py").write_text(APPLICATION)
        (home.directory / "newer").write_text(str(newer))
        self.deploy(older, "first")

    def deploy(self, version: int, turn: str) -> None:
        """Make a release the current one."""
        draft = self.home.directory / "draft"
        draft.symlink_to(release(self.home.directory, version))
        draft.replace(self._current)
        (self.home.directory / "turn").write_text(turn)

    def running(self):
        command = [
            str(pathlib.Path(sys.executable).with_name("gunicorn")), "-w", str(WORKERS),
            "-b", f"127.0.0.1:{self.port}", "--log-level", "warning", "app:app",
        ]  # fmt: skip
        return self.home.running(command, PYTHONPATH=str(self._current))

    def stats(self) -> dict:
        """Return the tree of metrics that a worker shows."""
        return json.loads(get(self.port, "/metrics")[2])

    def output(self) -> str:
        return (self.home.directory / "output.log").read_text(errors="replace")

    def aggregator(self) -> int:
        (service,) = self.home.services()
        return crashing.aggregator(service / "metrics.ipc.lock")

    def roll(self, master, hits: Hits, version: int, turn: str) -> None:
        """Replace all workers by those of a release, while requests are answered."""
        before = children(master.pid)
        self.deploy(version, turn)
        master.send_signal(signal.SIGHUP)
        wait_for(lambda: not before & children(master.pid), "the workers are new", 20)
        hits.wait_for_requests(turn)

    def wait_until_exact(self, hits: Hits, changed: str, level: int) -> dict:
        """Return the metrics once they are exact.

        ``changed`` is the turn whose workers alone have the metric ``changed``, of a kind that differs by
        release.
        """
        every = sum(hits.answered.values())
        expected = [every, every, hits.answered[changed]]
        found: list[float] = []

        def exact():
            stats = self.stats()
            requests = stats["http"]["server"]["request"]["duration"]
            shown = requests['{method="GET",route="/hit",status="200"}']["count"], stats["t"]["count"]
            found[:] = (*shown, *stats["changed"].values(), stats["level"]["value"])
            return stats if found[:3] == expected and found[-1] == level else None

        try:
            return wait_for(exact, f"{every} requests are counted, {hits.answered} ({level})", 5, every=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}: {found}") from None


@pytest.mark.parametrize("older", [VERSION, VERSION + 1])
def test_a_rolling_upgrade_and_its_way_back_lose_nothing(home, older):
    """Over a rolling upgrade and back, by SIGHUP under load, counts are exact and one newer aggregator
    serves.

    A metric is of another kind in the newer release, and a gauge merges in another way. The workers that
    started last win.
    """
    service = Rolling(home, older, older + 1)
    with service.running() as master:
        wait_for(lambda: get(service.port, "/metrics")[0] == 200, "gunicorn is up", 20)
        with Hits(service.port) as hits:
            hits.wait_for_requests("first")
            first = service.aggregator()
            service.roll(master, hits, service.newer, "second")
        assert hits.failed == []
        stats = service.wait_until_exact(hits, "second", LEVEL)
        second = service.aggregator()
        assert stats["tapes"]["rejected"]["value"] >= 1
        assert set(stats["changed"]) == {"count", "m1", "m5", "m15"}
        with Hits(service.port, hits) as hits:
            service.roll(master, hits, service.older, "third")
        assert hits.failed == []
        stats = service.wait_until_exact(hits, "third", LEVEL * WORKERS)
        assert set(stats["changed"]) == {"value"}
        assert second == service.aggregator() != first
        output = service.output()
    assert output.count("makes room for one of a newer version") == 1
    assert output.count(" listens at ") == 2
    assert "workers differ in its kind or in how it merges" in output
    assert "Traceback" not in output


BY_HAND = """
import signal, tapes
from tapes.distributed.registry import RegistryAggregator
from tapes.reporting.http import HTTPReporter
RegistryAggregator(HTTPReporter({port}), "ipc://m.ipc").start()
tapes.connect("ipc://m.ipc")
tapes.counter("older").increment(3)
signal.signal(signal.SIGTERM, lambda *_: exit())
signal.pause()
"""

NEWER = """
import sys, time, tapes
from tapes.errors import AggregatorUnavailable
tapes.connect("ipc://m.ipc")
counter = tapes.counter("newer")
seen = set()
until = time.monotonic() + 1.5  # long enough for the publisher's thread to notice
while time.monotonic() < until:
    counter.increment()
    try:
        tapes.get_stats()
    except AggregatorUnavailable as error:
        seen.add(str(error))
    time.sleep(0.05)
print(*seen, sep="\\n")
"""


OLDER = """
import os, signal, time, tapes
tapes.join("ipc://m.ipc")
if os.fork() == 0:
    tapes.counter("c").increment(5)
    exit()
os.wait()
tapes.counter("c").increment(3)
tapes.gauge("level", merge="sum").set(5)
tapes.get_stats()
print("up", flush=True)
signal.signal(signal.SIGTERM, lambda *_: exit())
while True:
    tapes.counter("changed").increment()
    time.sleep(0.05)
"""

NEWER_WORKERS = """
import os, sys, time, tapes
from tapes.errors import AggregatorUnavailable

def work():
    tapes.connect("ipc://m.ipc")
    tapes.counter("c").increment(10)
    tapes.meter("changed").mark(2)
    tapes.gauge("level", merge="max").set(5)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            return tapes.get_stats()
        except AggregatorUnavailable:
            time.sleep(0.02)

pids = []
for _ in range(8):
    pids.append(os.fork())
    if pids[-1] == 0:
        sys.exit(not work())
print([os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8, work().c.value)
seen = set()
for _ in range(20):  # the older worker runs meanwhile
    stats = tapes.get_stats()
    seen.add((stats.changed.get("count"), stats.level.value))
    time.sleep(0.05)
print(seen)
"""


def test_connecting_workers_of_a_newer_release_replace_an_older_aggregator(home):
    """Of eight newer workers that connect at once, one replaces the older aggregator, and no count is lost.

    A metric's kind and a gauge's merge mode are those of the newest workers, while an older worker goes on
    with others.
    """
    older, newer = (str(release(home.directory, version)) for version in (VERSION, VERSION + 1))
    log = home.directory / "output.log"
    with home.running([sys.executable, "-W", "error", "-c", OLDER], PYTHONPATH=older) as process:
        wait_for(lambda: "up\n" in log.read_text(), "the older one is up")
        status, output, errors = home.run(
            [sys.executable, "-W", "error", "-c", NEWER_WORKERS], PYTHONPATH=newer
        )
        assert (status, output) == (0, "True 98\n{(18, 5)}\n"), errors
        assert log.read_text().count("makes room for one of a newer version") == 1
        assert (log.read_text() + errors).count(" listens at ") == 2
        assert "Traceback" not in errors
        process.terminate()
        process.wait(5)
    wait_for(lambda: not list(home.directory.glob("m.ipc*")), "no file is left")


def test_reads_of_a_newer_worker_explain_an_older_aggregator_by_hand(home):
    """If an older aggregator was started by hand, newer workers' reads fail with the reason, and it stays."""
    port = free_port()
    older, newer = (str(release(home.directory, version)) for version in (VERSION, VERSION + 1))
    program = BY_HAND.format(port=port)
    with home.running([sys.executable, "-W", "error", "-c", program], PYTHONPATH=older) as process:
        stats = lambda: json.loads(get(port, "/metrics")[2])  # noqa: E731
        wait_for(lambda: stats().get("older", {}).get("value") == 3, "the older one is up")
        pid = crashing.aggregator(home.directory / "m.ipc.lock")
        status, output, errors = home.run([sys.executable, "-W", "error", "-c", NEWER], PYTHONPATH=newer)
        assert status == 0
        assert output.count("is of an older version of tapes") == len(output.splitlines()) == 1
        assert "restart the process that started it" in output
        assert "Traceback" not in errors
        found = stats()
        assert found["older"]["value"] == 3
        assert "newer" not in found
        assert found["tapes"]["rejected"]["value"] >= 1
        assert crashing.aggregator(home.directory / "m.ipc.lock") == pid
        process.terminate()
        process.wait(5)
    wait_for(lambda: not list(home.directory.glob("m.ipc*")), "no file is left")
