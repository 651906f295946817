"""Connecting, closing, connecting again, and exiting: each event counts once, and no exit needs a call."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

import tapes
from tapes.distributed.registry import DistributedRegistry
from tapes.errors import AggregatorUnavailable, InvalidArgument
from tapes.session import LocalSession
from tests.processes import clean_environment, connected, run_python, wait_for


def test_a_worker_that_connects_before_its_aggregator_starts_loses_nothing(short_dir, start_aggregator):
    """Events from before connect(), and from before the aggregator's start, arrive once it listens."""
    address = f"ipc://{short_dir}/m.ipc"
    early = DistributedRegistry(address)
    early.counter("c").increment(7)
    early.connect()
    with pytest.raises(AggregatorUnavailable, match="did not answer"):
        early.get_stats()
    with start_aggregator():
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        late = DistributedRegistry(address)
        late.connect()
        wait_for(lambda: late.get_stats().get("c", {}).get("value") == 7, "the keyframe arrives")
        early.close()
        assert late.get_stats().c.value == 7
        late.close()


def test_close_publishes_the_last_values(address):
    """After close() the aggregator has all counts of the worker, and none of its gauges."""
    with connected(address) as reader:
        for _ in range(20):
            worker = DistributedRegistry(address)
            worker.connect()
            worker.counter("c").increment(5)
            worker.gauge("g").set(1)
            worker.close()
        assert reader.get_stats().c.value == 100
        assert reader.snapshot().get("g") is None


def test_connecting_again_after_close_counts_everything_once(address):
    """A registry that closes and connects again starts from zero, so each event counts once; gauges stay."""
    registry = DistributedRegistry(address)
    for turn in range(1, 4):
        registry.connect()
        registry.connect()
        for kind, record in (("counter", "increment"), ("meter", "mark"), ("histogram", "update")):
            getattr(getattr(registry, kind)(kind[0]), record)(5)
        registry.timer("t").update(5)
        registry.gauge("g").set(turn)
        stats = registry.get_stats()
        assert (stats.c.value, stats.m["count"], stats.h["count"], stats.t["count"]) == (
            5 * turn, 5 * turn, turn, turn,
        )  # fmt: skip
        assert stats.g.value == turn
        registry.close()
        assert registry.get_stats().c.value == 0
        assert registry.get_stats().g.value == turn


def test_bad_values_that_close_finds_are_counted(address):
    """Bad values that are found only when close() folds them are counted in ``tapes.rejected``."""
    with connected(address) as worker:
        worker.histogram("h").update("bad")
        assert worker.get_stats().tapes.rejected.value == 1
        worker.histogram("h").update("bad again")
        worker.meter("m").mark("bad too")
    with connected(address) as reader:
        assert reader.get_stats().tapes.rejected.value == 3


def test_a_goodbye_without_a_reply_is_repeated_by_the_next_connection(address, aggregator):
    """If close() gets no reply, the next connection repeats the goodbye; nothing is lost or counted twice."""
    with connected(address) as registry:
        registry.counter("c").increment(5)
        assert registry.get_stats().c.value == 5
        registry.counter("c").increment(2)
        aggregator.send_signal(signal.SIGSTOP)
        try:
            registry.close()
        finally:
            aggregator.send_signal(signal.SIGCONT)
        registry.counter("c").increment(3)
        registry.connect()
        assert registry.get_stats().c.value == 10


def test_connecting_from_many_threads_makes_one_connection(address):
    """Threads that connect one registry at once make one connection, and its events count once."""
    registry = DistributedRegistry(address)
    registry.counter("c").increment(5)
    barrier = threading.Barrier(8)

    def connect():
        barrier.wait()
        registry.connect()

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.get_stats().c.value == 5
    assert sum(thread.name == "tapes-publisher" for thread in threading.enumerate()) == 1
    registry.close()


def test_another_address_while_connected_is_refused(address, monkeypatch):
    """connect() to another address while connected raises an error that names close()."""
    monkeypatch.setattr(tapes.default_registry, "session", LocalSession(tapes.default_registry))
    tapes.connect(address)
    tapes.connect(address)
    with pytest.raises(InvalidArgument, match="close"):
        tapes.connect(address + "2")
    tapes.close()


def test_a_process_that_exits_without_close_is_counted(address, short_dir):
    """A process that exits without close() has published all its counts."""
    done = run_python(
        f"""
from tapes import DistributedRegistry
registry = DistributedRegistry({address!r})
registry.connect()
registry.counter("c").increment(3)
""",
        cwd=short_dir,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with connected(address) as reader:
        assert reader.get_stats().c.value == 3


def test_multiprocessing_children_that_return_are_counted(address, aggregator, short_dir):
    """Children of multiprocessing, which run no atexit functions, are counted when their target returns."""
    (short_dir / "children.py").write_text(f"""
import multiprocessing
from tapes import DistributedRegistry

registry = DistributedRegistry({address!r})

def work():
    registry.connect()
    registry.counter("c").increment(5)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work) for _ in range(20)]
    for child in children:
        child.start()
    for child in children:
        child.join()
""")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "children.py"], cwd=short_dir, env=clean_environment(),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    with connected(address) as reader:
        assert reader.get_stats().c.value == 100


def test_a_missing_aggregator_is_logged_once(short_dir, caplog, monkeypatch):
    """A missing aggregator is logged once, even if the process never reads."""
    monkeypatch.setattr("tapes.distributed.worker.publisher._LONELY_SECONDS", 0.05)
    registry = DistributedRegistry(f"ipc://{short_dir}/m.ipc")
    registry.connect()
    wait_for(lambda: "no aggregator" in caplog.text, "the warning")
    registry.close()
    assert caplog.text.count("no aggregator") == 1


def test_published_counts_of_a_killed_worker_stay_and_its_gauges_go(address, short_dir):
    """The published counts of a killed worker stay in the totals, and its gauges are removed."""
    program = f"""
import os, signal
from tapes import DistributedRegistry
registry = DistributedRegistry({address!r})
registry.connect()
registry.counter("c").increment(3)
registry.gauge("g").set(1)
registry.get_stats()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(program, cwd=short_dir).returncode == -signal.SIGKILL
    with connected(address) as reader:
        assert reader.get_stats().c.value == 3
        wait_for(lambda: reader.snapshot().get("g") is None, "the gauge of the dead leaves")
        assert reader.get_stats().c.value == 3
