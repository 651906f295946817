"""A crew: the worker processes of one service, which a test controls by commands.

A worker is this module, run as a program. It reads a command as a line of JSON, executes it, and writes the
result as a line of JSON. Exceptions and slow calls that an application would have seen are in the results, so
a test can state that there were none.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tapes.errors import AggregatorUnavailable
from tests.processes import ROOT, clean_environment, mentions, wait_for

# A worker's wall clock can be shifted. The patch comes before any module that reads the time is imported.
_BOOT = """\
import runpy, time
wall, time.shift = time.time, 0.0
time.time = lambda: wall() + time.shift
runpy.run_module("tests.crew", run_name="__main__", alter_sys=False)
"""


class Worker:
    """The test's end of a worker process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid

    def send(self, command: str, *arguments: Any) -> None:
        """Send a command, a method of `Commands`; `receive` returns its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")

    def receive(self, seconds: float = 20.0) -> Any:
        """Return the result of the last command."""
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], seconds)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line, f"no result from worker {self.pid} within {seconds:g} s (status: {self.process.poll()})"
        return json.loads(line)

    def call(self, command: str, *arguments: Any, seconds: float = 20.0) -> Any:
        """Send a command and return its result."""
        self.send(command, *arguments)
        return self.receive(seconds)

    def exit(self) -> float:
        """Let the process return from its program; return how many seconds that took."""
        started = time.monotonic()
        self.send("exit")
        status = self.process.wait(20)
        self.close()
        assert status == 0, f"worker {self.pid} exited with {status}"
        return time.monotonic() - started

    def close(self) -> None:
        """Close the pipes to the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def memory(self) -> int:
        """The resident memory of the process, in bytes."""
        return resident(self.pid)


class Crew:
    """The workers of one service, and its aggregator.

    Args:
        directory: The working directory of the workers, with their log.
        socket_directory: The directory of the socket, ``directory`` if not given.

    Attributes:
        visible_directory: The directory of the socket under the path that this process has for it. The path
            differs if the directory is in another mount namespace.
    """

    def __init__(self, directory: pathlib.Path, socket_directory: pathlib.Path | None = None) -> None:
        self.directory = directory
        self.socket_directory = self.visible_directory = socket_directory or directory
        self.socket = "m.ipc"
        self.log = directory / "output.log"
        self.workers: list[Worker] = []

    @property
    def address(self) -> str:
        """The address of the service."""
        return f"ipc://{self.socket_directory}/{self.socket}"

    def start_worker(self, prefix: Sequence[str] = (), **environment: str) -> Worker:
        """Start a worker and return it once it has joined the service.

        Args:
            prefix: A command that runs the worker, such as ``nsenter``.
            environment: Variables of the worker's environment.
        """
        temporary = {"TMPDIR": str(self.socket_directory), "XDG_RUNTIME_DIR": str(self.socket_directory)}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-W", "error", "-c", _BOOT, self.address],
                cwd=self.directory,
                env=clean_environment(**temporary, PYTHONPATH=str(ROOT), **environment),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
            )  # fmt: skip
        worker = Worker(process)
        self.workers.append(worker)
        assert worker.receive() == "up"
        return worker

    @property
    def aggregator(self) -> int:
        """The pid of the running aggregator; waits until there is one."""

        def running() -> int:
            text = (self.visible_directory / f"{self.socket}.lock").read_text().partition("\n")[0]
            pid = int(text or 0)
            return pid if pid and "tapes" in _command(pid) else 0

        pid: int = wait_for(running, "an aggregator runs", 5)
        return pid

    def kill_aggregator(self) -> int:
        """Kill the aggregator by SIGKILL; return its pid."""
        pid = self.aggregator
        os.kill(pid, signal.SIGKILL)
        return pid

    def log_lines(self, text: str) -> int:
        """Return how many lines of the log contain ``text``."""
        return sum(text in line for line in self.log.read_text(errors="replace").splitlines())

    def kill_all(self) -> None:
        """Kill all remaining processes of the service, stopped ones included."""
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.process.send_signal(signal.SIGCONT)
                worker.process.kill()
            worker.process.wait()
            worker.close()
        for pid in mentions(self.address):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not mentions(str(self.directory)), "no process is left")


@contextlib.contextmanager
def crew(directory: pathlib.Path, socket_directory: pathlib.Path | None = None) -> Iterator[Crew]:
    """A service without workers yet; its remaining processes are killed at the end."""
    service = Crew(directory, socket_directory)
    try:
        yield service
    except BaseException:
        print(service.log.read_text(errors="replace")[-5000:] if service.log.exists() else "")
        raise
    finally:
        service.kill_all()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process by SIGSTOP, and continue it at the end of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: _state(pid) == "T", f"process {pid} is stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _state(pid: int) -> str:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _command(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def assert_all_counted(reader: Worker, workers: Sequence[Worker], seconds: float = 5.0) -> None:
    """Wait until a read shows exactly what the workers recorded, and assert that no recording call failed."""
    reports = [worker.call("report") for worker in workers]
    assert [report["errors"] for report in reports] == [[] for _ in reports]
    expected = [sum(report["counted"] for report in reports)] * 4
    last: list[Any] = []

    def exact() -> bool:
        last[:] = [reader.call("read").get("counts")]
        return last == [expected]

    try:
        wait_for(exact, "all events are counted", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}: {last} of {expected}") from None


def assert_children_succeeded(exits: list[Any], seconds: float = 1.7) -> None:
    """Assert that all children exited with 0, each within ``seconds`` of its fork: see `fork_children`."""
    assert {status for status, _ in exits} == {0}, exits
    assert max(taken for _, taken in exits) < seconds, exits


class Commands:
    """What a worker process can do."""

    def __init__(self, address: str) -> None:
        import tapes

        self._tapes = tapes
        self._files: list[int] = []
        self._stop = threading.Event()
        self._load: threading.Thread | None = None
        self._counter = tapes.counter("c")
        self._histogram = tapes.histogram("h")
        self._timer = tapes.timer("t")
        self._meter = tapes.meter("m")
        self._by_load = self._by_command = self._by_children = 0
        self._slowest, self._errors = 0.0, []
        tapes.join(address)

    def _record(self) -> None:
        """Record one event in every kind of metric."""
        started = time.perf_counter()
        try:
            self._counter.increment()
            self._meter.mark()
            self._histogram.update(7)
            with self._timer.time():
                pass
        except Exception as error:
            self._errors.append(repr(error))
        self._slowest = max(self._slowest, time.perf_counter() - started)

    def count(self, times: int) -> int:
        """Record ``times`` events."""
        for _ in range(times):
            self._record()
            self._by_command += 1
        return times

    def start_load(self, pause: float = 0.001, seconds: float = 60.0) -> None:
        """Start a thread that records an event every ``pause`` seconds, for at most ``seconds``."""

        def run() -> None:
            until = time.perf_counter() + seconds
            while not self._stop.wait(pause) and time.perf_counter() < until:
                self._record()
                self._by_load += 1

        self._stop.clear()
        self._load = threading.Thread(target=run)
        self._load.start()

    def stop_load(self) -> None:
        """Stop the thread of `start_load`."""
        self._stop.set()
        if self._load is not None:
            self._load.join()

    def shift_wall_clock(self, hours: float) -> float:
        """Shift the wall clock of this process; return the time that it shows."""
        time.shift = 3600.0 * hours  # type: ignore[attr-defined]
        return time.time()

    def report(self) -> dict[str, Any]:
        """Return what happened in this process.

        ``counted`` are the events recorded here and by children that exited with 0, ``errors`` the exceptions
        of recording calls, and ``slowest`` the seconds of the slowest call since the last report.
        """
        slowest, self._slowest = self._slowest, 0.0
        counted = self._by_load + self._by_command + self._by_children
        return {"counted": counted, "errors": self._errors, "slowest": slowest}

    def read(self) -> dict[str, Any]:
        """Read the counts of the whole service; return them, or the error, and how long the read took."""
        started = time.perf_counter()
        try:
            stats = self._tapes.get_stats()
        except AggregatorUnavailable as error:
            return {"seconds": time.perf_counter() - started, "unavailable": str(error)}
        return {
            "seconds": time.perf_counter() - started,
            "counts": [stats.get("c", {}).get("value", 0)]
            + [stats.get(name, {}).get("count", 0) for name in "mht"],
            "rates": [stats[n][rate] for n in "mt" if n in stats for rate in ("m1", "m5", "m15")],
            "tapes": stats.tapes,
        }

    def names(self) -> list[str]:
        """Return the names of all metrics of the service."""
        return sorted(self._tapes.get_stats())

    def fork_children(self, number: int, each: int, at_once: int = 1, leave: int = -1) -> list[Any]:
        """Fork children that record ``each`` events and exit.

        Args:
            number: How many children.
            each: How many events each of them records.
            at_once: How many of them run at a time.
            leave: How many free file descriptors each of them has at most; no limit if negative.

        Returns:
            For each child its exit status, and the seconds from its fork to its exit.
        """
        exits: list[Any] = []
        running: list[tuple[int, float]] = []
        for _ in range(number):
            started = time.perf_counter()
            pid = os.fork()
            if pid == 0:
                if leave >= 0:
                    self.exhaust_descriptors(200, leave)
                self.count(each)
                sys.exit(bool(self._errors))
            running.append((pid, started))
            if len(running) == at_once:
                exits += map(_wait_for_exit, running)
                running.clear()
        exits += map(_wait_for_exit, running)
        self._by_children += each * sum(status == 0 for status, _ in exits)
        return exits

    def exhaust_descriptors(self, limit: int, leave: int = 0) -> int:
        """Limit the file descriptors to ``limit`` and open all but ``leave``; return how many were opened."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with contextlib.suppress(OSError):
            while True:
                self._files.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(leave):
            os.close(self._files.pop())
        return len(self._files)

    def release_descriptors(self) -> None:
        """Close the descriptors that `exhaust_descriptors` opened."""
        while self._files:
            os.close(self._files.pop())


def _wait_for_exit(child: tuple[int, float]) -> list[Any]:
    pid, started = child
    _, status = os.waitpid(pid, 0)
    return [os.waitstatus_to_exitcode(status), time.perf_counter() - started]


def _main(address: str) -> None:
    commands = Commands(address)
    print(json.dumps("up"), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "exit":
            return
        print(json.dumps(getattr(commands, command)(*arguments)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
