"""Real processes for tests: start, wait for a condition with a deadline, end by pid."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Callable

from tapes.errors import AggregatorUnavailable

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


NOT_YET = (OSError, http.client.HTTPException, json.JSONDecodeError, AggregatorUnavailable)
"""What asking a service raises that is not up, or about to be replaced."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 10.0, every: float = 0.02) -> Any:
    """Return the first true result of ``condition``; fail if there is none in time.

    A service that can't be asked just now has not fulfilled it yet.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            result = condition()
            if result:
                return result
        except NOT_YET as error:
            result = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what} (last: {result!r})")
        time.sleep(every)


def free_port() -> int:
    """Return a TCP port that is free now and was not given before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


_given: set[int] = set()


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    """Return status, headers and body of one request to loopback on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@contextlib.contextmanager
def running(command: list[str], *, cwd: pathlib.Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Run a command in a session of its own; end it, if it hasn't ended, by TERM and then by KILL."""
    with (cwd / "output.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=clean_environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    except BaseException:
        print((cwd / "output.log").read_text(errors="replace")[-5000:])
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(8)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what would change how tapes behaves."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TAPES_")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **more}


def run_python(source: str, *, cwd: pathlib.Path, seconds: float = 30, **environment: str):
    """Run a Python program in a process of its own and return what became of it."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def children(pid: int) -> set[int]:
    """Return the pids of a process's children."""
    return {int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


class Home:
    """Directories that a service may use, empty before and after."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.private = directory / "run"
        self.private.mkdir()
        self.environment = {"TMPDIR": str(self.private), "XDG_RUNTIME_DIR": str(self.private)}

    def running(self, command: list[str], **more: str):
        """Run a command in the background; see `running`."""
        return running(command, cwd=self.directory, **self.environment, **more)

    def run(self, command: list[str], seconds: float = 30, **more: str) -> tuple[int, str, str]:
        """Run a command; return status, output and errors, without waiting for an aggregator's end."""
        log = self.directory / "errors.log"
        with log.open("w") as errors:
            done = subprocess.run(
                command, cwd=self.directory, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=clean_environment(**self.environment, **more), timeout=seconds, check=False,
            )  # fmt: skip
        return done.returncode, done.stdout, log.read_text()

    def services(self) -> list[pathlib.Path]:
        """Return the private directories of services."""
        return list(self.private.glob("tapes-*"))

    def nothing_left(self) -> bool:
        """Whether no process and no file is left."""
        return not mentions(str(self.directory)) and not list(self.private.iterdir())


def mentions(text: str) -> list[int]:
    """Return the pids of the living processes whose command line or working directory has ``text``."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            where = os.readlink(entry / "cwd")
            if text in where or text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
