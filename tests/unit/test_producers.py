"""The producers of a connected registry: a read waits for those that never ran."""

from __future__ import annotations

import threading

import tapes
from tapes.distributed.producers import Producers
from tests.processes import wait_for


def test_a_read_waits_for_a_producer_that_was_made_while_another_one_ran():
    """The round that runs just then does not know it."""
    registry = tapes.Registry()
    producers = Producers(registry)
    runs, goes_on, was_read = threading.Event(), threading.Event(), threading.Event()
    registry.gauge("first", lambda: (runs.set(), goes_on.wait(10), 1)[-1])
    producers.tend()
    assert runs.wait(10)
    newest = registry.gauge("newest", lambda: (was_read.wait(0.1), 2)[-1])
    values = []

    def read():
        producers.await_first()
        values.append(newest.collect().value)
        was_read.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(lambda: not producers._wake.locked(), "the read asked for another round")
        goes_on.set()
        reader.join()
        assert values == [2]
    finally:
        assert producers.stop(10)
