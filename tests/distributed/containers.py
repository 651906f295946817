"""A container of a service that has several, all on one volume.

Run as a program, this module is process 1 of a container. It keeps a number of workers running, which count
for a while and exit. It reads the total all the time, and it logs what its workers counted and what it read.
On SIGTERM it terminates its workers and returns; the kernel then kills what is left in its pid namespace.
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
"""Runs a command as process 1 of a new pid namespace, which is killed if ``unshare`` is."""


class Read(NamedTuple):
    """One read of the total: when it began, when it was answered, and the total."""

    asked: float
    answered: float
    total: int


class Container:
    """A container that a test starts and stops, any number of times.

    Args:
        directory: The volume.
        name: A part of the names of its files.
        command: Its process 1.
    """

    def __init__(self, directory: pathlib.Path, name: str, command: list[str], **environment: str) -> None:
        self.name = name
        self._directory = directory
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the container."""
        with (self._directory / f"output-{self.name}").open("ab") as log:
            self._process = subprocess.Popen(
                [*UNSHARE, *self._command], cwd=self._directory, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, env=clean_environment(PYTHONPATH=str(ROOT), **self._environment),
            )  # fmt: skip

    def stop(self) -> None:
        """Stop the container by SIGTERM to its process 1, and wait for its exit."""
        assert self._process is not None
        (first,) = children(self._process.pid)
        os.kill(first, signal.SIGTERM)
        assert self._process.wait(30) == 0, self.output()
        self._process = None

    def kill(self) -> None:
        """Kill the container if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def output(self) -> str:
        """Return what its processes have printed."""
        return (self._directory / f"output-{self.name}").read_text(errors="replace")


def worker_container(directory: pathlib.Path, name: str, workers: int) -> Container:
    """Return a container whose process 1 is this module, with ``workers`` workers at a time."""
    address = f"ipc://{directory}/m.ipc"
    command = [sys.executable, "-m", "tests.distributed.containers", address, name, str(workers)]
    return Container(directory, name, command)


def counted(directory: pathlib.Path) -> int:
    """Return how many events the workers that have exited had counted, from their own logs."""
    return sum(int(path.read_text()) for path in directory.glob("counted-*"))


def reads(directory: pathlib.Path, name: str = "*") -> list[Read]:
    """Return all reads, in the order of their answers."""
    found = []
    for path in directory.glob(f"reads-{name}-*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                asked, answered, total = line.split()
                found.append(Read(float(asked), float(answered), int(total)))
    return sorted(found, key=lambda read: read.answered)


def decreases(found: list[Read]) -> list[tuple[Read, Read]]:
    """Return the reads of less than some container had read before they began, each with the earlier one."""
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
def killed_at_end(*containers: Container) -> Iterator[None]:
    """Kill containers at the end of the block; print their output if the block fails."""
    try:
        yield
    except BaseException:
        for container in containers:
            print(container.output()[-5000:])
        raise
    finally:
        for container in containers:
            container.kill()


def stop_and_start_in_turn(directory: pathlib.Path, rounds: int, workers: int = 3) -> str:
    """Let two containers count, stop and start one of them in each round, and return figures.

    Raises:
        AssertionError: If a total decreased, or the last one is not what was counted.
    """
    both = [worker_container(directory, name, workers) for name in "ab"]

    def wait_for_reads(container: Container, number: int) -> None:
        goal = len(reads(directory, container.name)) + number
        wait_for(lambda: len(reads(directory, container.name)) >= goal, f"{container.name} reads")

    with killed_at_end(*both):
        for container in both:
            container.start()
            wait_for_reads(container, 20)
        for turn in range(rounds):
            one, other = both[turn % 2], both[1 - turn % 2]
            one.stop()
            wait_for_reads(other, 40)
            one.start()
            wait_for_reads(one, 20)
        both[0].stop()
        (directory / "quiet").touch()
        wait_for(lambda: (directory / "is-quiet").exists(), "the workers have ended")
        last = reads(directory)[-1].total
        total = wait_for(lambda: counted(directory) == reads(directory)[-1].total and counted(directory),
                         f"the total is {counted(directory)}, not {last}", 10)  # fmt: skip
        wait_for_reads(both[1], 20)
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
    """Count for a while and return, so that the last values are handed over."""
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, terminate)
    tapes.join(address)
    source = random.Random(seed)
    until, number = time.monotonic() + source.uniform(0.1, 1.5), 0
    while not terminated and time.monotonic() < until:
        tapes.counter("c").increment()
        number += 1
        time.sleep(0.002)
    pathlib.Path(f"counted-{name}-{time.monotonic_ns()}").write_text(str(number))


def _main(address: str, name: str, workers: int) -> None:
    alive: set[int] = set()
    started = 0
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, terminate)
    with open(f"reads-{name}-{time.monotonic_ns()}", "w", buffering=1) as log:
        while not terminated:
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
