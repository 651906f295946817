"""Gauges of workers that start and exit, and the metrics of tapes about itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tapes.distributed.registry import DistributedRegistry
from tests.processes import clean_environment, wait_for

WORKER = """
import signal, sys
from tapes import DistributedRegistry
registry = DistributedRegistry(sys.argv[1])
registry.connect()
for mode in ("sum", "max", "min", "mean", "last", "each"):
    registry.gauge(mode, merge=mode).set(int(sys.argv[2]))
registry.get_stats()
print("up", flush=True)
signal.pause()
"""


def worker(reader, value):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, reader.socket_addr, str(value)], env=clean_environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.alone
def test_every_merge_mode_over_workers_of_which_one_is_killed(reader):
    """A killed worker's gauges vanish at once, except with ``last``; ``each`` has the living workers."""
    workers = [worker(reader, value) for value in (2, 3, 7)]
    try:
        stats = reader.get_stats()
        merged = {mode: stats[mode].value for mode in ("sum", "max", "min", "mean", "last")}
        assert merged == {"sum": 12, "max": 7, "min": 2, "mean": 4, "last": 7}
        each = {dict(series.labels)["worker"]: series.value for series in reader.snapshot().series("each")}
        assert each == {str(process.pid): value for process, value in zip(workers, (2, 3, 7))}
        workers[2].kill()
        workers[2].wait()
        wait_for(lambda: reader.snapshot().get("sum").value == 5, "its gauges leave", 1.8)
        stats = reader.get_stats()
        merged = {mode: stats[mode].value for mode in ("sum", "max", "min", "mean", "last")}
        assert merged == {"sum": 5, "max": 3, "min": 2, "mean": 2.5, "last": 7}
        assert len(reader.snapshot().series("each")) == 2
        assert reader.get_stats().tapes.workers['{state="live"}'].value == 3
        wait_for(lambda: reader.get_stats().tapes.workers['{state="retired"}'].value == 1, "it is retired")
    finally:
        for process in workers:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.alone
def test_producers_run_once_a_second_and_in_no_request(reader):
    """Producers of gauges run once a second, however often the metrics are read."""
    threads = []

    def produce():
        threads.append(threading.current_thread().name)
        return 5

    reader.gauge("g", produce)
    started = time.monotonic()
    while time.monotonic() - started < 1.5:
        assert reader.get_stats().g.value == 5
    assert 2 <= len(threads) <= 3
    assert set(threads) == {"tapes-producer"}


def test_neither_reads_nor_publications_wait_for_a_slow_producer(reader):
    """While a producer hangs, only its gauge is missing: counts are published, reads and forks work."""
    release = threading.Event()
    reader.gauge("slow", lambda: release.wait(60) and 5)
    started = time.monotonic()
    assert reader.get_stats().get("slow") is None
    assert time.monotonic() - started < 10
    other = DistributedRegistry(reader.socket_addr)
    other.connect()
    for number in range(1, 4):
        reader.counter("c").increment()
        wait_for(lambda n=number: other.get_stats().get("c", {}).get("value") == n, "it is published")
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    other.close()
    release.set()
    wait_for(lambda: reader.get_stats().get("slow", {}).get("value") == 5, "it comes")


@pytest.mark.alone
def test_metrics_about_tapes_itself(reader):
    """tapes.* has workers, messages, cost and lag of publishing, and memory; idle workers publish nothing."""
    reader.counter("c").increment()
    wait_for(lambda: reader.get_stats().tapes.publish.get("duration"), "something is published")
    own = reader.get_stats().tapes
    assert own.workers == {'{state="live"}': {"value": 1}, '{state="retired"}': {"value": 0}}
    assert 0 < own.publish.duration.min < 0.1
    assert 0 < own.publish.lag.min < 0.5
    assert 2**20 < own.aggregator.memory.value < 2**28
    before = reader.get_stats().tapes.messages.value
    time.sleep(0.5)  # five intervals
    assert reader.get_stats().tapes.messages.value <= before + 2  # the read itself, and one on its way


def test_a_parent_that_forks_repeatedly_leaks_no_descriptor(reader):
    """A fork leaves no descriptor of the parent's connection open."""
    program = f"""
import os, tapes
tapes.connect({reader.socket_addr!r})
tapes.counter("c").increment()

def fork(times):
    for _ in range(times):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/fd"))

assert fork(50) + 25 > fork(50)  # 0MQ opens some by itself
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=clean_environment(), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_kills_is_like_sigkill(reader):
    """SIGTERM without a handler loses at most the last interval, like SIGKILL."""
    process = worker(reader, 1)
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    process.stdout.close()
    wait_for(lambda: reader.get_stats().tapes.workers['{state="retired"}'].value == 1, "it is retired")
    assert os.getpid() != process.pid
