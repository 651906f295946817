"""A container of a service that has several, all on one volume.

Run as a program it is process 1 of a container: it has workers, which come and go and count, and it reads. It
writes down what its workers counted and what it read. On SIGTERM it ends its workers and returns; the kernel
then kills what is left in its pid namespace.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import tapes
from tapes.errors import AggregatorUnavailable
from tests.processes import ROOT, children, clean_environment, wait_for

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""Runs a command as process 1 of a pid namespace of its own, which ends with unshare itself."""


class Read(NamedTuple):
    """A total that a process of a container has read: when it asked, when it had the answer, the total."""

    asked: float
    answered: float
    total: int


class Container:
    """A container that is started and stopped, in turns.

    Args:
        directory: The volume.
        name: Of its files.
        command: What its process 1 is.
    """

    def __init__(self, directory: pathlib.Path, name: str, command: list[str], **environment: str) -> None:
        self.name = name
        self._directory = directory
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start its process 1."""
        with (self._directory / f"output-{self.name}").open("ab") as log:
            self._process = subprocess.Popen(
                [*UNSHARE, *self._command], cwd=self._directory, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, env=clean_environment(PYTHONPATH=str(ROOT), **self._environment),
            )  # fmt: skip

    def stop(self) -> None:
        """Stop it in an orderly way, by SIGTERM to its process 1."""
        assert self._process is not None
        (first,) = children(self._process.pid)
        os.kill(first, signal.SIGTERM)
        assert self._process.wait(30) == 0, self.output()
        self._process = None

    def clear_away(self) -> None:
        """End it at once, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def output(self) -> str:
        return (self._directory / f"output-{self.name}").read_text(errors="replace")


def worker_container(directory: pathlib.Path, name: str, workers: int) -> Container:
    """Return a container whose process 1 is this module, with so many workers at a time."""
    address = f"ipc://{directory}/m.ipc"
    command = [sys.executable, "-m", "tests.distributed.containers", address, name, str(workers)]
    return Container(directory, name, command)


def counted(directory: pathlib.Path) -> int:
    """Return what workers that have ended had counted, by their own account."""
    return sum(int(path.read_text()) for path in directory.glob("counted-*"))


def reads(directory: pathlib.Path, name: str = "*") -> list[Read]:
    """Return what was read, in the order of the answers."""
    found = []
    for path in directory.glob(f"reads-{name}-*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                asked, answered, total = line.split()
                found.append(Read(float(asked), float(answered), int(total)))
    return sorted(found, key=lambda read: read.answered)


def decreases(found: list[Read]) -> list[tuple[Read, Read]]:
    """Return reads of less than had been read before they began, whichever container had read it."""
    wrong, answered, highest = [], iter(found), Read(0.0, 0.0, 0)
    following = next(answered, None)
    for read in sorted(found):
        while following is not None and following.answered < read.asked:
            highest = max(highest, following, key=lambda one: one.total)
            following = next(answered, None)
        if read.total < highest.total:
            wrong.append((highest, read))
    return wrong


@contextlib.contextmanager
def cleared_away(*containers: Container) -> Iterator[None]:
    """End containers in the end; show what they wrote if something failed."""
    try:
        yield
    except BaseException:
        for container in containers:
            print(container.output()[-5000:])
        raise
    finally:
        for container in containers:
            container.clear_away()


def stop_and_start_in_turn(directory: pathlib.Path, rounds: int, workers: int = 3) -> str:
    """Have two containers count, and stop and start one of them in each round; return figures.

    Raises:
        AssertionError: If a total decreased, or is not what was counted in the end.
    """
    both = [worker_container(directory, name, workers) for name in "ab"]

    def go_on(container: Container, many: int) -> None:
        begin = len(reads(directory, container.name))
        wait_for(lambda: len(reads(directory, container.name)) >= begin + many, f"{container.name} reads")

    with cleared_away(*both):
        for container in both:
            container.start()
            go_on(container, 20)
        for turn in range(rounds):
            one, other = both[turn % 2], both[1 - turn % 2]
            one.stop()
            go_on(other, 40)
            one.start()
            go_on(one, 20)
        both[0].stop()
        (directory / "quiet").touch()
        wait_for(lambda: (directory / "is-quiet").exists(), "the workers have ended")
        last = reads(directory)[-1].total
        total = wait_for(lambda: counted(directory) == reads(directory)[-1].total and counted(directory),
                         f"the total is {counted(directory)}, not {last}", 10)  # fmt: skip
        go_on(both[1], 20)
        both[1].stop()
        found = reads(directory)
        assert found[-1].total == total == counted(directory)
        assert decreases(found) == []
        output = "".join(container.output() for container in both)
        assert "Traceback" not in output
    gaps = [later.answered - read.answered for read, later in itertools.pairwise(found)]
    ended = len(list(directory.glob("counted-*")))
    return (
        f"{rounds} stops, {ended} workers, {total} events, {len(found)} reads, longest without an answer "
        f"{max(gaps):.2f} s, {output.count('takes the place')} take-overs"
    )


def _work(name: str, address: str, seed: int) -> None:
    """Count for a while; then return, so that the last values are handed over."""
    ends = False

    def end(*_: object) -> None:
        nonlocal ends
        ends = True

    signal.signal(signal.SIGTERM, end)
    tapes.join(address)
    source = random.Random(seed)
    until, number = time.monotonic() + source.uniform(0.1, 1.5), 0
    while not ends and time.monotonic() < until:
        tapes.counter("c").increment()
        number += 1
        time.sleep(0.002)
    pathlib.Path(f"counted-{name}-{time.monotonic_ns()}").write_text(str(number))


def _main(address: str, name: str, workers: int) -> None:
    alive: set[int] = set()
    started = 0
    ends = False

    def end(*_: object) -> None:
        nonlocal ends
        ends = True

    signal.signal(signal.SIGTERM, end)
    with open(f"reads-{name}-{time.monotonic_ns()}", "w", buffering=1) as log:
        while not ends:
            quiet = pathlib.Path("quiet").exists()
            while len(alive) < workers and not quiet:
                started += 1
                pid = os.fork()
                if pid == 0:
                    _work(name, address, started)
                    sys.exit(0)
                alive.add(pid)
            while alive and (pid := os.waitpid(-1, os.WNOHANG)[0]):
                alive.discard(pid)
            if quiet and not alive:
                pathlib.Path("is-quiet").touch()
            if started == workers:
                tapes.join(address)
            asked = time.monotonic()
            with contextlib.suppress(AggregatorUnavailable):
                total = tapes.get_stats().get("c", {}).get("value", 0)
                log.write(f"{asked} {time.monotonic()} {total}\n")
            time.sleep(0.01)
    for pid in alive:
        os.kill(pid, signal.SIGTERM)
    while alive:
        alive.discard(os.waitpid(-1, 0)[0])


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
