"""The last worker's goodbye is acknowledged after the push reporters have reported: StatsD has all counts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tapes.distributed.transport.address import resolve
from tapes.distributed.transport.requests import flush
from tests.processes import ROOT, clean_environment, connected, run_python, running, wait_for
from tests.receivers import Receiver

pytestmark = pytest.mark.alone  # reports are waited for, but for half a second only

AGGREGATOR = """
import threading
from datetime import timedelta
from tapes.distributed.registry import RegistryAggregator
from tapes.reporting import ScheduledReporter
from tapes.reporting.statsd import StatsdReporter
from tapes.reporting.stream import ThreadedStreamReporter

HOUR = timedelta(hours=1)

class Own(ScheduledReporter):
    def report(self):
        with open("own", "a") as file:
            print(self.registry.get_stats().get("c", {{}}).get("value", 0), file=file)

RegistryAggregator([{reporters}], "ipc://m.ipc").start(fork=False)
"""

WORKER = """
import os, sys, tapes
registry = tapes.DistributedRegistry("ipc://m.ipc")
registry.connect()
registry.counter("c").increment(int(sys.argv[1]))
registry.get_stats()
print("up", flush=True)
sys.stdin.read()
registry.close()
print("closed", flush=True)
os._exit(0)
"""


@pytest.fixture
def receiver():
    """A StatsD receiver."""
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


@contextlib.contextmanager
def aggregator(directory, reporters):
    """Run an aggregator with ``reporters`` that report once an hour."""
    with running([sys.executable, "-c", AGGREGATOR.format(reporters=reporters)], cwd=directory) as process:
        wait_for((directory / "m.ipc.read").exists, "the aggregator listens")
        yield process


@contextlib.contextmanager
def running_worker(directory, n):
    """Run a worker that has counted ``n`` events and closes when its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(n)], cwd=directory, stdin=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, env=clean_environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_every_push_reporter_has_reported_when_the_last_goodbye_is_acknowledged(short_dir, receiver):
    """When the last worker's close() returns, StatsD, stream and custom reporters have its counts."""
    reporters = (
        f"Own(HOUR), StatsdReporter(HOUR, '127.0.0.1', {receiver.port}),"
        " ThreadedStreamReporter(HOUR, open('lines', 'w'))"
    )
    with aggregator(short_dir, reporters) as process:
        for turn in range(1, 6):
            with connected(f"ipc://{short_dir}/m.ipc") as worker:
                worker.counter("c").increment(10)
            assert receiver.counts()["c"] == 10 * turn
            assert (short_dir / "own").read_text().split()[-1] == str(10 * turn)
            assert f'"c": {{"value": {10 * turn}}}' in (short_dir / "lines").read_text().splitlines()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 0
    assert receiver.counts()["c"] == 50
    own = (short_dir / "own").read_text().split()
    assert own == ["0", "10", "20", "30", "40", "50", "50"]


def test_a_goodbye_does_not_wait_for_reports_while_other_workers_run(short_dir, receiver):
    """While another worker runs, close() does not wait for a report."""
    with aggregator(short_dir, f"StatsdReporter(HOUR, '127.0.0.1', {receiver.port})"):
        with connected(f"ipc://{short_dir}/m.ipc") as one:
            with connected(f"ipc://{short_dir}/m.ipc") as two:
                two.counter("c").increment(7)
                one.get_stats()
            assert one.get_stats().c.value == 7
            assert "c" not in receiver.counts()
        assert receiver.counts()["c"] == 7


def test_workers_that_exit_at_the_same_moment_are_reported_once(short_dir, receiver):
    """When two workers that exit at the same moment are acknowledged, StatsD has the counts of both, once."""
    with aggregator(short_dir, f"StatsdReporter(HOUR, '127.0.0.1', {receiver.port})"):
        for turn in range(1, 11):
            with running_worker(short_dir, 3) as one, running_worker(short_dir, 4) as two:
                one.stdin.close()
                two.stdin.close()
                assert [w.stdout.readline() for w in (one, two)] == ["closed\n"] * 2
                assert receiver.counts()["c"] == 7 * turn


def test_what_a_killed_last_worker_published_is_reported_before_the_grace_is_over(short_dir, receiver):
    """What a killed last worker had published is reported within 1.8 s, and not again later."""
    with aggregator(short_dir, f"StatsdReporter(HOUR, '127.0.0.1', {receiver.port})"):
        with running_worker(short_dir, 5) as worker:
            worker.send_signal(signal.SIGKILL)
            wait_for(lambda: receiver.counts().get("c") == 5, "it is reported", 1.8)
        with running_worker(short_dir, 6) as worker:
            worker.stdin.close()
            assert worker.stdout.readline() == "closed\n"
        assert receiver.counts()["c"] == 11


@pytest.mark.parametrize("kind", ["accepts and never reads", "does not accept"])
def test_a_hanging_receiver_delays_a_goodbye_by_half_a_second(short_dir, receiver, kind):
    """A hanging receiver delays close() by half a second; the other receiver gets all, no file is left."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as dead, contextlib.ExitStack() as stack:
        port = dead.getsockname()[1]
        if kind == "does not accept":  # its queue is full: a connection takes as long as it may
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
        reporters = f"""
    StatsdReporter(HOUR, "127.0.0.1", {port}, "x" * 7000, protocol="tcp"),
    StatsdReporter(HOUR, "127.0.0.1", {receiver.port})"""
        with aggregator(short_dir, reporters):
            worker = stack.enter_context(connected(f"ipc://{short_dir}/m.ipc"))
            for number in range(1500):  # of 7,000 bytes each: more than the kernel takes for one that hangs
                worker.counter("c", n=number).increment()
            worker.get_stats()
            started = time.monotonic()
            worker.close()
            seconds = time.monotonic() - started
            assert sum(receiver.counts().values()) >= 1500
            assert 0.4 < seconds < 0.9
            assert not list(short_dir.glob("*.spool-*"))


def test_a_flush_is_answered_after_the_reports(short_dir, receiver):
    """flush() returns true after the reports; if the aggregator does not answer, it returns false."""
    address = f"ipc://{short_dir}/m.ipc"
    with aggregator(short_dir, f"StatsdReporter(HOUR, '127.0.0.1', {receiver.port})") as process:
        with connected(address) as worker:
            for turn in range(1, 6):
                worker.counter("c").increment(5)
                worker.get_stats()
                assert flush(resolve(address))
                assert receiver.counts()["c"] == 5 * turn
        os.kill(process.pid, signal.SIGSTOP)
        assert not flush(resolve(address))
        os.kill(process.pid, signal.SIGCONT)


HOOK = """
import sys, types
from tapes.contrib import gunicorn_conf
pids = dict(zip(("reexec_pid", "master_pid"), map(int, sys.argv[1:])))
gunicorn_conf.on_exit(types.SimpleNamespace(**pids))
"""


def test_gunicorns_master_waits_for_reports_unless_another_master_runs(short_dir, receiver):
    """on_exit waits for a report, except during an upgrade, when another master keeps running."""
    address = f"ipc://{short_dir}/m.ipc"
    (short_dir / "run").mkdir()

    def exit_master(*pids):
        program = f"import sys; sys.argv[1:] = {[str(pid) for pid in pids]}\n" + HOOK
        done = run_python(program, cwd=short_dir / "run", TAPES_ADDR=address, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr

    reporter = f"StatsdReporter(HOUR, '127.0.0.1', {receiver.port})"
    with aggregator(short_dir, reporter), connected(address) as worker:
        worker.counter("c").increment(5)
        worker.get_stats()
        exit_master(123, 0)
        exit_master(0, os.getpid())
        assert "c" not in receiver.counts()
        exit_master(0, 0)
        assert receiver.counts()["c"] == 5
        worker.counter("c").increment(5)
        worker.get_stats()
        exit_master(0, 1 << 22)
        assert receiver.counts()["c"] == 10
    exit_master(0, 0)
