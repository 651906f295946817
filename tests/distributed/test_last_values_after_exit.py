"""A gauge that merges by ``last``, in real processes: the newest value stays, however its worker exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.contrib.services import has_ended
from tests.crew import stopped
from tests.distributed import crashing
from tests.processes import ROOT, clean_environment, connected, wait_for

WORKER = """
import sys, tapes
tapes.join(sys.argv[1])
if sys.argv[2] == "produced":
    tapes.gauge("g", lambda: int(sys.argv[3]), merge="last")
else:
    tapes.gauge("g", merge="last").set(int(sys.argv[3]))
tapes.gauge("alive").set(1)
tapes.get_stats()
print("up", flush=True)
sys.stdin.readline()
"""


class Service:
    """Workers that set a gauge, at one address."""

    def __init__(self, directory) -> None:
        self.directory = directory
        self.address = f"ipc://{directory}/m.ipc"
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, value: int, how: str = "set") -> subprocess.Popen[bytes]:
        """Start a worker and return it once its value has been read."""
        command = [sys.executable, "-W", "error", "-c", WORKER, self.address, how, str(value)]
        environment = clean_environment(PYTHONPATH=str(ROOT))
        with (self.directory / "output.log").open("ab") as log:
            worker = subprocess.Popen(
                command, cwd=self.directory, env=environment, stderr=log,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        self.workers.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"up\n"
        return worker

    def stop(self, worker, how: str) -> None:
        """End a worker: let it return from its program, or kill it."""
        if how == "return":
            worker.stdin.close()
            assert worker.wait(20) == 0
        else:
            worker.kill()
            worker.wait()

    def kill_aggregator(self) -> None:
        """Kill the aggregator and wait until it has ended."""
        pid = crashing.aggregator(self.directory / "m.ipc.lock")
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: has_ended(pid), "the aggregator has ended")

    def assert_shown(self, reader, value: int, alive: int) -> None:
        """Wait until the reader sees ``alive`` live workers, and assert the gauge's value in that read."""

        def seen():
            snapshot = reader.snapshot()
            living = snapshot.get("alive")
            gauge = snapshot.get("g")
            assert gauge is not None
            return (living.value if living else 0) == alive and [gauge.value]

        assert wait_for(seen, f"{alive} workers live") == [value]


@pytest.fixture
def service(short_dir, monkeypatch) -> Iterator[Service]:
    """A service without workers yet; they are killed at the end."""
    monkeypatch.setenv("TAPES_AUTOSTART", "0")  # a reader that starts an aggregator would keep it running
    made = Service(short_dir)
    try:
        yield made
    finally:
        for worker in made.workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                pipe.close()
        wait_for(lambda: not list(short_dir.glob("m.ipc*")), "no file is left")


@pytest.mark.parametrize("how", ["return", "kill"])
@pytest.mark.parametrize("given", ["set", "produced"])
def test_the_last_value_stays_when_its_worker_exits(service, how, given):
    """The newest value stays when its worker returns or is killed, also when no worker is left."""
    first, second = service.start(100), service.start(42, given)
    with connected(service.address) as reader:
        service.assert_shown(reader, 42, 2)
        service.stop(second, how)
        service.assert_shown(reader, 42, 1)
        service.stop(first, how)
        service.assert_shown(reader, 42, 0)
        service.stop(service.start(7), how)
        service.assert_shown(reader, 7, 0)


@pytest.mark.parametrize("how", ["return", "kill", "kill at once"])
def test_the_last_value_stays_when_the_aggregator_is_killed(service, how):
    """The newest value stays if the aggregator is killed before, after, or together with its worker."""
    service.start(100)
    second = service.start(42)
    with connected(service.address) as reader:
        service.assert_shown(reader, 42, 2)
        if how == "kill at once":
            journal = service.directory / "m.ipc.journal"
            written = journal.stat().st_mtime_ns
            wait_for(lambda: journal.stat().st_mtime_ns != written, "the value is in the journal")
            second.kill()
            service.kill_aggregator()
            second.wait()
        else:
            service.stop(second, how)
            service.assert_shown(reader, 42, 1)
            if how == "kill":  # the journal has the worker, or already its death
                service.kill_aggregator()
        service.assert_shown(reader, 42, 1)
        service.kill_aggregator()
        service.assert_shown(reader, 42, 1)
        third = service.start(43)
        service.kill_aggregator()
        service.assert_shown(reader, 43, 2)
        service.stop(third, "return")
        service.assert_shown(reader, 43, 1)


def test_the_last_value_of_a_worker_that_left_it_in_a_file_stays(service):
    """The newest value stays if its worker left it in a file, because no aggregator replied at its exit."""
    service.start(100)
    second = service.start(42)
    with connected(service.address) as reader:
        service.assert_shown(reader, 42, 2)
        pid = crashing.aggregator(service.directory / "m.ipc.lock")
        with stopped(pid):
            service.stop(second, "return")
            assert list(service.directory.glob("m.ipc.spool-*"))
            os.kill(pid, signal.SIGKILL)
        service.assert_shown(reader, 42, 1)
