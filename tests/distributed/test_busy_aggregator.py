"""An aggregator with readers that never pause, or with an answer of many megabytes, serves all clients."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time

import pytest

import tapes
from tapes.exposition import render
from tests.processes import connected, wait_for


def record_and_exit(address: str, took: multiprocessing.SimpleQueue) -> None:
    """Connect, record, close; put how many seconds close() took."""
    with connected(address) as registry:
        registry.counter("left").increment(3)
        start = time.monotonic()
    took.put(time.monotonic() - start)


@pytest.mark.alone
def test_goodbyes_do_not_wait_behind_readers(address):
    """While eight readers never pause, workers close within 1 s each and all of them are counted."""
    with connected(address) as registry:
        for number in range(2000):
            registry.timer("work", route=f"/some/route/number/{number}").update(0.25)
        stop = threading.Event()

        def read() -> None:
            with connected(address) as reader:
                while not stop.is_set():
                    with contextlib.suppress(tapes.TapesError):  # it may be too busy
                        reader.get_stats()

        readers = [threading.Thread(target=read) for _ in range(8)]
        for reader in readers:
            reader.start()
        try:
            context = multiprocessing.get_context("spawn")
            took = context.SimpleQueue()
            for _ in range(5):
                child = context.Process(target=record_and_exit, args=(address, took))
                child.start()
                child.join()
                assert child.exitcode == 0
                assert took.get() < 1.0
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert registry.get_stats().left.value == 15


def test_an_answer_of_more_than_64_mb_reaches_its_reader(address):
    """An answer of more than 64 MB is sent in frames, and its reader waits until it is complete."""
    with connected(address) as registry:
        for number in range(2000):
            for name in ("one", "two", "three"):
                registry.timer(name, agent=f"{number:x<1000}").update(0.25)
        wait_for(lambda: registry.get_stats().three, "the aggregator knows them")
        text = wait_for(lambda: render(registry, "prometheus"), "it is answered")
        assert len(text) > 64 << 20
        assert text.count(b"_seconds_count{") == 6000
        (family,) = [family for family in registry.snapshot() if family.name == "two"]
        assert sum(series.count for series in family.series) == 2000
