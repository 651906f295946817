"""Workers for tests of what can go wrong: they count, fork and read as they are told, and say how it went.

A worker is this module as a program: it takes a line of JSON, does it, and answers by a line of
JSON. Whatever the application would have got (an exception, a slow call) is in the answers.
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

AGGREGATOR_LINE = "listens at"
"""What every aggregator says of itself, once."""

# The wall clock can be set ahead: before anything that tells the time is imported.
_BOOT = """\
import runpy, time
wall, time.ahead = time.time, 0.0
time.time = lambda: wall() + time.ahead
runpy.run_module("tests.crew", run_name="__main__", alter_sys=False)
"""


class Hand:
    """A worker in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid

    def send(self, command: str, *arguments: Any) -> None:
        """Give a command; its answer is to be taken by `receive`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")

    def receive(self, seconds: float = 20.0) -> Any:
        """Return the answer to the command that was given last."""
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], seconds)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line, f"worker {self.pid} said nothing within {seconds:g} s (ended: {self.process.poll()})"
        return json.loads(line)

    def ask(self, command: str, *arguments: Any, seconds: float = 20.0) -> Any:
        """Return the answer to a command."""
        self.send(command, *arguments)
        return self.receive(seconds)

    def end(self) -> float:
        """Have it end by itself; return how long that took."""
        started = time.monotonic()
        self.send("end")
        status = self.process.wait(20)
        self.close()
        assert status == 0, f"worker {self.pid} ended with {status}"
        return time.monotonic() - started

    def close(self) -> None:
        """Close the pipes to it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def memory(self) -> int:
        """Its resident memory in bytes."""
        return resident(self.pid)


class Crew:
    """The workers of one service, and its aggregator.

    Args:
        directory: Where everything is: the socket, the log, private directories.
        meets: The directory of the socket, ``directory`` if not given.
        seen: The same directory as this process sees it, if it is in another mount namespace.
    """

    def __init__(self, directory: pathlib.Path, meets: pathlib.Path | None = None) -> None:
        self.directory = directory
        self.meets = self.seen = meets or directory
        self.socket = "m.ipc"
        self.log = directory / "output.log"
        self.hands: list[Hand] = []
        self._aggregators: set[int] = set()

    @property
    def address(self) -> str:
        """Where they meet."""
        return f"ipc://{self.meets}/{self.socket}"

    def hire(self, prefix: Sequence[str] = (), **environment: str) -> Hand:
        """Return a new worker that has joined the service."""
        temporary = {"TMPDIR": str(self.meets), "XDG_RUNTIME_DIR": str(self.meets)}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-W", "error", "-c", _BOOT, self.address],
                cwd=self.directory,
                env=clean_environment(**temporary, PYTHONPATH=str(ROOT), **environment),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
            )  # fmt: skip
        hand = Hand(process)
        self.hands.append(hand)
        assert hand.receive() == "up"
        return hand

    @property
    def aggregator(self) -> int:
        """The pid of the aggregator that lives; waits for one."""

        def living() -> int:
            text = (self.seen / f"{self.socket}.lock").read_text().partition("\n")[0]
            pid = int(text or 0)
            return pid if pid and "tapes" in _command(pid) else 0

        pid: int = wait_for(living, "an aggregator lives", 5)
        self._aggregators.add(pid)
        return pid

    def kill_aggregator(self) -> int:
        """End the aggregator as by a crash; return its pid."""
        pid = self.aggregator
        os.kill(pid, signal.SIGKILL)
        return pid

    def said(self, words: str) -> int:
        """How many lines of the log have ``words``."""
        return sum(words in line for line in self.log.read_text(errors="replace").splitlines())

    def clear_away(self) -> None:
        """End every process of the service that is left, stopped ones too."""
        for hand in self.hands:
            with contextlib.suppress(OSError):
                hand.process.send_signal(signal.SIGCONT)
                hand.process.kill()
            hand.process.wait()
            hand.close()
        for pid in mentions(self.address):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not mentions(str(self.directory)), "no process is left")


@contextlib.contextmanager
def crew(directory: pathlib.Path, meets: pathlib.Path | None = None) -> Iterator[Crew]:
    """A service without workers yet; what is left of it at the end is ended."""
    found = Crew(directory, meets)
    try:
        yield found
    except BaseException:
        print(found.log.read_text(errors="replace")[-5000:] if found.log.exists() else "")
        raise
    finally:
        found.clear_away()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is stopped meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: _state(pid) == "T", "it is stopped")
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


class Work:
    """What a worker can be told to do."""

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

    def _event(self) -> None:
        """Count once, by every kind of metric."""
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
        """Count so often."""
        for _ in range(times):
            self._event()
            self._by_command += 1
        return times

    def load(self, pause: float = 0.001, seconds: float = 60.0) -> None:
        """Begin to count in a thread of its own, for so long at most."""

        def run() -> None:
            until = time.perf_counter() + seconds
            while not self._stop.wait(pause) and time.perf_counter() < until:
                self._event()
                self._by_load += 1

        self._stop.clear()
        self._load = threading.Thread(target=run)
        self._load.start()

    def halt(self) -> None:
        """Stop counting."""
        self._stop.set()
        if self._load is not None:
            self._load.join()

    def jump(self, hours: float) -> float:
        """Set the wall clock of this process so far ahead; return what it tells."""
        time.ahead = 3600.0 * hours  # type: ignore[attr-defined]
        return time.time()

    def told(self) -> dict[str, Any]:
        """Return what was counted here and by children that ended well, what went wrong, and the slowest call
        since this was asked last."""
        slowest, self._slowest = self._slowest, 0.0
        counted = self._by_load + self._by_command + self._by_children
        return {"counted": counted, "errors": self._errors, "slowest": slowest}

    def read(self) -> dict[str, Any]:
        """Return the counts of the whole service, or why there are none, and how long that took."""
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

    def children(self, number: int, each: int, at_once: int = 1, leave: int = -1) -> list[Any]:
        """Fork children that count and end; return each one's exit status, and the seconds from its fork.

        If ``leave`` is not negative, they have no more than so many descriptors left.
        """
        ended: list[Any] = []
        living: list[tuple[int, float]] = []
        for _ in range(number):
            started = time.perf_counter()
            pid = os.fork()
            if pid == 0:
                if leave >= 0:
                    self.fill(200, leave)
                self.count(each)
                sys.exit(bool(self._errors))
            living.append((pid, started))
            if len(living) == at_once:
                ended += map(_ended, living)
                living.clear()
        ended += map(_ended, living)
        self._by_children += each * sum(status == 0 for status, _ in ended)
        return ended

    def fill(self, limit: int, leave: int = 0) -> int:
        """Take every file descriptor that there is, up to ``limit``, but for some; return how many."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with contextlib.suppress(OSError):
            while True:
                self._files.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(leave):
            os.close(self._files.pop())
        return len(self._files)

    def empty(self) -> None:
        """Give them back."""
        while self._files:
            os.close(self._files.pop())


def _ended(child: tuple[int, float]) -> list[Any]:
    pid, started = child
    _, status = os.waitpid(pid, 0)
    return [os.waitstatus_to_exitcode(status), time.perf_counter() - started]


def _main(address: str) -> None:
    work = Work(address)
    print(json.dumps("up"), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "end":
            return
        print(json.dumps(getattr(work, command)(*arguments)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
