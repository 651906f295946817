"""Real processes for tests: start them, wait for a condition with a deadline, end them by pid."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import zmq

from tapes.distributed.registry import DistributedRegistry
from tapes.errors import AggregatorUnavailable

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

C = TypeVar("C", bound="Clients")

NOT_YET = (OSError, http.client.HTTPException, json.JSONDecodeError, AggregatorUnavailable)
"""What a request to a service raises that does not listen yet, or whose aggregator is being replaced."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30.0, every: float = 0.02) -> Any:
    """Return the first true result of ``condition``; fail if there is none within ``seconds``.

    A condition that raises one of `NOT_YET` is not fulfilled yet. The default leaves enough time for tests
    that run side by side. Pass fewer ``seconds`` only for a time that tapes guarantees.
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
    """Return a TCP and UDP port that is free now and that no test gets twice, in this process or another.

    Tests run side by side in several processes, so each process takes blocks of ports: it binds the first
    port of a block, and keeps it bound until it exits. The ports are below those that the system gives to
    clients, because a connection could have such a port when a server is about to listen on it.
    """
    return next(_ports)


_PORTS_OF_A_BLOCK = 100


def _free_ports() -> Iterator[int]:
    end = 32768
    with contextlib.suppress(OSError, ValueError):  # without /proc they are usually above that
        end = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    blocks = range(10000, end if end > 20000 else 32768, _PORTS_OF_A_BLOCK)[:-1]
    begin = os.getpid() % len(blocks)
    for first in [*blocks[begin:], *blocks[:begin]]:
        try:
            with socket.socket() as holder:
                holder.bind(("127.0.0.1", first))
                holder.detach()  # it stays open until this process ends
        except OSError:
            continue
        yield from filter(_is_free, range(first + 1, first + _PORTS_OF_A_BLOCK))
    raise AssertionError("no port is free")


def _is_free(port: int) -> bool:
    try:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as probe:
                probe.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


_ports = _free_ports()


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
    """Run a command in a session of its own; at the end of the block, terminate it, and then kill it.

    If the block fails, the command's output and the state of its processes are printed.
    """
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
        for pid in mentions(str(cwd)):
            print(_state(pid))
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(8)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _state(pid: int) -> str:
    """Return the state of a process and its signal masks, which show why it has not exited."""
    entry = pathlib.Path("/proc") / str(pid)
    fields = ("State", "PPid", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Threads")
    try:
        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
        status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
        return f"{pid} {command}: " + " ".join(f"{field}={status[field].split()[0]}" for field in fields)
    except OSError as error:
        return f"{pid}: {error}"


class Clients:
    """Threads that each run `_request` until they are stopped."""

    def __init__(self, clients: int) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._request) for _ in range(clients)]

    def __enter__(self: C) -> C:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _request(self) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def connected(address: str) -> Iterator[DistributedRegistry]:
    """Connect a registry, and close it at the end of the block."""
    registry = DistributedRegistry(address)
    registry.connect()
    try:
        yield registry
    finally:
        registry.close()


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without variables that change how tapes or pytest behave."""
    ours = ("TAPES_", "PYTEST_XDIST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **more}


def run_python(source: str, *, cwd: pathlib.Path, seconds: float = 60, **environment: str):
    """Run a Python program in a process of its own and return the completed process."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def python_for_any_user(*modules: str) -> tuple[str, str]:
    """Return an interpreter of this version that any user can run, with its path for ``modules``."""
    path = ":".join([str(ROOT), *(entry for entry in sys.path if entry.endswith("site-packages"))])
    code = f"import os, sys, {', '.join(modules)}; print(sys.version_info[:2], os.path.realpath(os.__file__))"
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [python, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
            )
            version, _, library = done.stdout.strip().rpartition(" ")
            parents = pathlib.Path(library).parents
            if version == str(sys.version_info[:2]) and all(p.stat().st_mode & stat.S_IXOTH for p in parents):
                return python, path
    pytest.skip("no interpreter of this version that any user can run")


MAY_FORK_BESIDE_THREADS = (
    "import warnings\n"
    "warnings.filterwarnings('ignore', 'This process .* is multi-threaded', DeprecationWarning)\n"
    if sys.version_info >= (3, 15)  # older versions print the warning even if it is an error
    else ""
)
"""The first lines of a program that forks while one of its threads is alive."""


@contextlib.contextmanager
def zmq_context() -> Iterator[zmq.Context[Any]]:
    """A 0MQ context whose sockets wait at most 10 s to send or to receive."""
    context: zmq.Context[Any] = zmq.Context()
    context.sndtimeo = context.rcvtimeo = 10_000
    try:
        yield context
    finally:
        context.destroy(linger=0)


def children(pid: int) -> set[int]:
    """Return the pids of a process's children."""
    return {int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


class Home:
    """The directories of a service: its working directory, and a private one for temporary files."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.private = directory / "run"
        self.private.mkdir()
        self.environment = {"TMPDIR": str(self.private), "XDG_RUNTIME_DIR": str(self.private)}

    def running(self, command: list[str], **more: str):
        """Run a command in a session of its own; at the end of the block, terminate it, and then kill it.

        If the block fails, the command's output and the state of its processes are printed.
        """
        return running(command, cwd=self.directory, **self.environment, **more)

    def run(self, command: list[str], seconds: float = 60, **more: str) -> tuple[int, str, str]:
        """Run a command; return status, output and errors, without waiting for its aggregator."""
        log = self.directory / "errors.log"
        with log.open("w") as errors:
            done = subprocess.run(
                command, cwd=self.directory, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=clean_environment(**self.environment, **more), timeout=seconds, check=False,
            )  # fmt: skip
        return done.returncode, done.stdout, log.read_text()

    def services(self) -> list[pathlib.Path]:
        """Return the runtime directories of services."""
        return list(self.private.glob("tapes-*"))

    def nothing_left(self) -> bool:
        """Return whether no process and no file of the service is left."""
        return not mentions(str(self.directory)) and not list(self.private.iterdir())


def mentions(text: str) -> list[int]:
    """Return the pids of running processes whose command line or working directory contains ``text``."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            where = os.readlink(entry / "cwd")
            if text in where or text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
