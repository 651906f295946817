"""Real services under real servers, and what they count."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.processes import EXAMPLES, Clients, Home, connected, free_port, get, mentions, running, wait_for


class Service:
    """The example shop under gunicorn, in directories that are empty before and after the test."""

    def __init__(self, directory: pathlib.Path, arguments: list[str], **environment: str) -> None:
        self.directory = directory
        self.private = directory / "tmp"
        self.private.mkdir()
        self.port = free_port()
        self.command = [
            str(pathlib.Path(sys.executable).with_name("gunicorn")), *arguments,
            "-b", f"127.0.0.1:{self.port}",
            "--chdir", str(EXAMPLES), "-c", "python:tapes.contrib.gunicorn_conf", "flask_shop:app",
        ]  # fmt: skip
        self.environment = {
            "TMPDIR": str(self.private), "XDG_RUNTIME_DIR": str(self.private), **environment
        }  # fmt: skip

    def running(self):
        return running(self.command, cwd=self.directory, **self.environment)

    def wait_until_up(self) -> None:
        """Wait until gunicorn answers, by a request that is not counted."""
        wait_for(lambda: get(self.port, "/metrics")[0] == 200, "gunicorn is up")

    def output(self) -> str:
        return (self.directory / "output.log").read_text(errors="replace")

    def nothing_left(self) -> bool:
        return not mentions(str(self.directory)) and not list(self.private.iterdir())


def counts(port: int) -> dict[tuple[str, str, str], int]:
    """Return the number of requests by method, route and status, from whichever worker answers."""
    tree = json.loads(get(port, "/metrics")[2])
    for name in ("http", "server", "request", "duration"):
        tree = tree.get(name, {})
    pattern = re.compile(r'{method="(.*)",route="(.*)",status="(.*)"}')
    plain = {selector.replace("\\\\", "\\"): values["count"] for selector, values in tree.items()}
    return {pattern.fullmatch(selector).groups(): count for selector, count in plain.items()}


def gone_requests(port: int) -> int:
    """Return how many requests for ``/old-catalogue`` (410 Gone) are counted, as of 0.1 s ago."""
    return counts(port).get(("GET", "/old-catalogue", "410"), 0)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the result of a call, and how many seconds it took."""
    started = time.monotonic()
    return call(*arguments), time.monotonic() - started


@contextlib.contextmanager
def aggregator_in_use(home: Home) -> Iterator[None]:
    """Keep a service's aggregator in use; an idle one closes its HTTP port at once."""
    (service,) = home.services()
    with connected(f"ipc://{service}/metrics.ipc") as registry:
        registry.get_stats()
        yield


def session(leader: int) -> list[int]:
    """Return the pids of a session."""
    return [pid for pid, fields in _processes() if int(fields[3]) == leader]


def has_ended(pid: int) -> bool:
    """Return whether no process of this pid runs; its parent may not have waited for it yet."""
    return all(number != pid or fields[0] in "ZX" for number, fields in _processes())


def cpu_times(leader: int) -> str:
    """Return the processor times of the processes of a session, as text."""
    return str([(pid, fields[11:13]) for pid, fields in _processes() if int(fields[3]) == leader])


def _processes() -> Iterator[tuple[int, list[str]]]:
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                yield int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()


def signal_to(pid: int, number: int) -> None:
    """Send a signal to a process that may have exited."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Load(Clients):
    """Clients that request one path, each request on a connection of its own, until they are stopped."""

    def __init__(self, port: int, path: str, clients: int = 4) -> None:
        super().__init__(clients)
        self.answered = 0
        self.sent = 0
        self.times: list[float] = []
        self._port, self._path = port, path

    def wait_for_requests(self, requests: int = 300, seconds: float = 60.0) -> None:
        """Return when ``requests`` more requests have been answered."""
        goal = self.answered + requests
        wait_for(lambda: self.answered >= goal, "requests are answered", seconds)

    def _request(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                self.sent += 1
            with contextlib.suppress(OSError, http.client.HTTPException):
                get(self._port, self._path)
                with self._lock:
                    self.answered += 1
                    self.times.append(time.monotonic())
