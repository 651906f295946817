"""Reporters in an aggregator: each count is reported once, over restarts too; none disturbs another one."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tapes.distributed.registry import DistributedRegistry
from tests.processes import free_port, get, mentions, running, wait_for
from tests.receivers import Receiver

PROGRAM = """
import sys
from datetime import timedelta
from tapes.distributed.registry import RegistryAggregator
from tapes.reporting.http import HTTPReporter
from tapes.reporting.statsd import StatsdReporter
from tapes.reporting.stream import ThreadedStreamReporter
SHORT = timedelta(milliseconds=20)
RegistryAggregator([{reporters}], "ipc://m.ipc").start(fork=False)
"""


@contextlib.contextmanager
def aggregator(directory, reporters):
    """Run an aggregator with ``reporters`` in a process of its own; terminate it at the end of the block."""
    with running([sys.executable, "-c", PROGRAM.format(reporters=reporters)], cwd=directory) as process:
        wait_for((directory / "m.ipc.read").exists, "the aggregator listens")
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(8) == 0


@pytest.fixture
def receiver():
    """A StatsD receiver."""
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


@pytest.fixture
def connected(short_dir):
    """Three connected registries, each of them a worker."""
    workers = [DistributedRegistry(f"ipc://{short_dir}/m.ipc") for _ in range(3)]
    for worker in workers:
        worker.connect()
    yield workers
    with ThreadPoolExecutor(len(workers)) as pool:  # each waits for an acknowledgement that does not come
        list(pool.map(DistributedRegistry.close, workers))


def test_a_later_aggregator_reports_no_count_again(short_dir, receiver, connected):
    """Over four aggregators StatsD gets each count once, of workers that stay, exit and join meanwhile."""
    to_statsd = f"StatsdReporter(SHORT, '127.0.0.1', {receiver.port})"

    def count(*workers):
        for worker in workers:
            worker.counter("c").increment(100)
            worker.timer("t", l="x").update(1)

    def assert_reported(total):
        wait_for(lambda: receiver.counts().get("c") == total * 100, f"{total} are reported")
        assert receiver.counts()["t.l.x.count"] == total

    first, second, third = connected
    with aggregator(short_dir, to_statsd):
        count(first, second)
        first.counter("c").decrement(30)
        second.counter("c").increment(30)
        assert_reported(2)
    for round_ in range(3):
        with aggregator(short_dir, to_statsd):
            wait_for(lambda: third.snapshot().get("c"), "the workers have published")
            assert_reported(2 + 2 * round_)
            count(first, third)
            assert_reported(4 + 2 * round_)
    second.close()  # while no aggregator runs: a file keeps the goodbye
    with aggregator(short_dir, to_statsd):
        count(first)
        assert_reported(9)
    negative = [line for packet in receiver.packets for line in packet.split(b"\n") if b":-" in line]
    assert negative == []


def kill(process):
    process.kill()
    process.wait()


def test_a_killed_aggregator_leaves_its_unsent_counts_to_the_next_one(short_dir, receiver, connected):
    """After SIGKILL the next aggregator sends what was not yet sent: of live workers and of exited ones."""
    first, second, third = connected
    seldom = f"StatsdReporter(timedelta(hours=1), '127.0.0.1', {receiver.port})"
    for round_ in range(1, 4):
        with aggregator(short_dir, seldom) as process:
            sent = 11 * (round_ - 1)
            wait_for(lambda s=sent: receiver.counts().get("c", 0) == s, "the first report has the rest")
            for number, worker in enumerate((first, second)):
                worker.counter("c").increment(10**number)
            wait_for(lambda r=round_: first.snapshot().get("c").value == 11 * r, "both are known")
            assert receiver.counts().get("c", 0) == sent
            kill(process)
    third.counter("c").increment(100)
    with aggregator(short_dir, seldom) as process:
        wait_for(lambda: receiver.counts().get("c") == 133, "everything so far is sent")
        third.counter("c").increment(1000)
        third.close()
        kill(process)
    with aggregator(short_dir, f"StatsdReporter(SHORT, '127.0.0.1', {receiver.port})"):
        wait_for(lambda: receiver.counts()["c"] == 1133, "the counts of the exited worker are sent")
        first.counter("c").increment(10000)
        wait_for(lambda: receiver.counts()["c"] == 11133, "the next count is sent")


def test_kills_under_load_send_nothing_twice(short_dir, receiver, connected):
    """Aggregators that report every 20 ms are killed while workers count: each loses one packet at most."""
    often = f"StatsdReporter(SHORT, '127.0.0.1', {receiver.port})"
    stop, counted = threading.Event(), [0] * len(connected)

    def count(number):
        while not stop.wait(0.001):
            connected[number].counter("c").increment()
            counted[number] += 1

    threads = [threading.Thread(target=count, args=(number,)) for number in range(len(connected))]
    for thread in threads:
        thread.start()
    for _ in range(4):
        with aggregator(short_dir, often) as process:
            before = receiver.counts().get("c", 0)
            wait_for(lambda b=before: receiver.counts().get("c", 0) > b + 50, "it reports")
            kill(process)
            assert receiver.counts()["c"] <= sum(counted)
    with aggregator(short_dir, often):
        stop.set()
        for thread in threads:
            thread.join()
        total = sum(counted)
        lines = [line for packet in receiver.packets for line in packet.split(b"\n") if line[:2] == b"c:"]
        largest = max(int(line[2:].partition(b"|")[0]) for line in lines)
        wait_for(lambda: total - 4 * largest <= receiver.counts()["c"] <= total, "the rest is sent")
        wait_for(lambda: connected[0].snapshot().get("c").value == total, "all is known")
    assert total - 4 * largest <= receiver.counts()["c"] <= total
    print(f"{total - receiver.counts()['c']} of {total} lost, {largest} in the largest packet")


FAMILY = """
import os, sys, time
from tapes.distributed.registry import DistributedRegistry
registry = DistributedRegistry("ipc://m.ipc")
registry.connect()
counter = registry.counter("c")

def wait(step):
    while not os.path.exists(step):
        time.sleep(0.005)

counter.increment(10)
if os.fork():  # the parent counts on, and publishes later than its child
    counter.increment(990)
    wait("away")
    os.fork() or (counter.increment(7), wait("again"), registry.close(), os._exit(0))
    wait("again")
    os.wait(), os.wait()
else:
    wait("again")
registry.close()
"""


@pytest.mark.parametrize("late", [False, True], ids=["any order", "the child first"])
def test_forked_families_are_reported_once_over_two_aggregators(short_dir, receiver, late):
    """Two aggregators in turn report the events of a process and its forked children once."""
    to_statsd = f"StatsdReporter(SHORT, '127.0.0.1', {receiver.port})"
    (short_dir / "family").mkdir()
    with running([sys.executable, "-c", FAMILY.replace("ipc://m.ipc", f"ipc://{short_dir}/m.ipc")],
                 cwd=short_dir / "family") as family:  # fmt: skip
        with aggregator(short_dir, to_statsd):
            wait_for(lambda: receiver.counts().get("c") == 1000, "all is reported")
        (short_dir / "family" / "away").touch()
        wait_for(lambda: len(mentions(str(short_dir / "family"))) == 3, "it has forked again")
        if late:
            os.kill(family.pid, signal.SIGSTOP)
        with aggregator(short_dir, to_statsd):
            if late:
                wait_for(lambda: receiver.counts().get("c") == 1007, "what is new is reported")
                os.kill(family.pid, signal.SIGCONT)
            (short_dir / "family" / "again").touch()
            assert family.wait(10) == 0
        assert receiver.counts()["c"] == 1007
    assert [
        line for packet in receiver.packets for line in packet.split(b"\n") if line.startswith(b"c:-")
    ] == []


def test_a_worker_that_closes_without_an_aggregator_leaves_only_new_counts(short_dir, receiver, connected):
    """A worker that closes while no aggregator runs leaves what is not reported yet, and nothing else."""
    to_statsd = f"StatsdReporter(SHORT, '127.0.0.1', {receiver.port})"
    one, two, _ = connected
    with aggregator(short_dir, to_statsd):
        for worker in (one, two):
            worker.counter("c").increment(100)
            worker.histogram("h").update(1)
        wait_for(lambda: receiver.counts().get("c") == 200, "all is reported")
    one.close()
    two.counter("c").increment(1)
    two.close()
    one.connect()
    with aggregator(short_dir, to_statsd):
        wait_for(lambda: one.snapshot().get("c").value == 201, "the files of both are read")
        wait_for(lambda: receiver.counts()["c"] == 201, "what is new is reported")
    assert receiver.counts()["h.count"] == 2


def test_a_series_that_one_worker_removes_is_not_reported_again(short_dir, receiver, connected):
    """If one worker removes a series, the counts of the others are not reported again."""
    with aggregator(short_dir, f"StatsdReporter(SHORT, '127.0.0.1', {receiver.port})"):
        for number, worker in enumerate(connected, 1):
            worker.counter("c").increment(number)
        wait_for(lambda: receiver.counts().get("c") == 6, "all is reported")
        connected[0].remove("c")
        wait_for(lambda: connected[1].snapshot().get("c").value == 5, "it is removed")
        connected[1].counter("d").increment()
        wait_for(lambda: receiver.counts().get("d") == 1, "another report")
        connected[2].counter("c").increment(3)
        wait_for(lambda: receiver.counts()["c"] == 9, "what is new is reported")


def test_reporters_that_hang_do_not_keep_another_from_its_last_report(short_dir, receiver):
    """Hanging reporters prevent neither another reporter's last report nor the aggregator's exit."""
    program = f"""
import os, threading, time
from datetime import timedelta
from tapes.distributed.registry import *
from tapes.reporting import ScheduledReporter
from tapes.reporting.statsd import StatsdReporter
class Hanging(ScheduledReporter):
    def report(self):
        threading.Event().wait()
HOUR = timedelta(hours=1)
reporters = [Hanging(HOUR), StatsdReporter(HOUR, "127.0.0.1", {receiver.port}), Hanging(HOUR), Hanging(HOUR)]
aggregator = RegistryAggregator(reporters, "ipc://m.ipc")
aggregator.start()
registry = DistributedRegistry("ipc://m.ipc")
registry.connect()
registry.counter("c").increment(5)
registry.close()
aggregator.stop()
assert not [name for name in os.listdir() if name != "output.log"], os.listdir()
"""
    with running([sys.executable, "-c", program], cwd=short_dir) as process:
        assert process.wait(20) == 0
    assert receiver.counts()["c"] == 5


def test_reporters_in_workers_add_up_to_the_total(short_dir, receiver, connected):
    """If each worker has a StatsdReporter, StatsD's counts add up to the total; gauges are merged ones."""
    from datetime import timedelta

    from tapes.reporting.statsd import StatsdReporter

    with aggregator(short_dir, ""):
        for number, worker in enumerate(connected, 1):
            worker.counter("c").increment(number)
            worker.gauge("g").set(number)
            wait_for(lambda n=number, w=worker: w.get_stats().c.value == n * (n + 1) // 2, "all is known")
        for worker in connected:
            with StatsdReporter(timedelta(hours=1), "127.0.0.1", receiver.port, registry=worker):
                worker.counter("c").increment(10)
        assert receiver.counts()["c"] == 36
        gauges = [line for packet in receiver.packets for line in packet.split(b"\n") if line[:2] == b"g:"]
        assert set(gauges) == {b"g:6|g"}


class Hostile:
    """A TCP port that accepts and never reads, sends garbage without end, or closes every connection."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.connections: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self.threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                self.connections.append(connection)
                if self.kind == "closes":
                    connection.close()
                elif self.kind == "garbage":
                    self.threads.append(threading.Thread(target=self._send_garbage, args=(connection,)))
                    self.threads[-1].start()

    def _send_garbage(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"\x00\xffgarbage|c\n" * 1000)


@pytest.mark.parametrize("kind", ["hangs", "refuses", "garbage", "closes"])
def test_a_faulty_receiver_disturbs_no_other_reporter(short_dir, receiver, connected, kind):
    """A faulty receiver disturbs neither application nor other reporters; it is counted and logged once."""
    http = free_port()
    with contextlib.closing(Hostile(kind)) as hostile:
        port = free_port() if kind == "refuses" else hostile.port
        reporters = f"""
    HTTPReporter({http}),
    StatsdReporter(SHORT, "127.0.0.1", {port}, "x" * 2000, protocol="tcp"),
    StatsdReporter(4 * SHORT, "127.0.0.1", {receiver.port}, "good"),
    ThreadedStreamReporter(SHORT, open("lines", "w")),
"""
        with aggregator(short_dir, reporters) as process:
            worker = connected[0]
            for number in range(60):  # few enough that a report fits into the receiver's buffer
                worker.histogram("h", n=number).update(number)
            worker.counter("c").increment(5)
            wait_for(lambda: receiver.counts().get("good.c") == 5, "the other one is reported")
            for name in ("tapes.reports.failed", "tapes.statsd.failed"):
                wait_for(lambda n=name: worker.snapshot().get(n, reporter="StatsdReporter"), "it fails", 30)
            before = memory(process.pid)
            for round_ in range(2, 12):
                worker.counter("c").increment(5)
                wait_for(lambda r=round_: receiver.counts()["good.c"] == 5 * r, "reports go on")
                assert json.loads(get(http, "/")[2])["c"]["value"] == 5 * round_
            assert memory(process.pid) < before + (8 << 20)
            lines = (short_dir / "lines").read_text().splitlines()
            assert len(lines) > 10
            assert all(map(json.loads, lines[:-1]))
    logged = (short_dir / "output.log").read_text().splitlines()
    assert len([line for line in logged if "StatsdReporter: a report failed" in line]) == 1, logged


def memory(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
