"""Recording from signal handlers, from destructors, and when a handler raises: exact, and never stuck."""

from __future__ import annotations

import gc
import platform
import signal
import sys
import threading
import time

import pytest

import tapes

KINDS = {
    "counter": "increment",
    "meter": "mark",
    "histogram": "update",
    "timer": "update",
    "gauge": "increment",
}


def total(registry, kind):
    fields = registry.snapshot().get("m").fields()
    return fields["sum" if kind in ("histogram", "timer") else "count" if kind == "meter" else "value"]


@pytest.fixture
def interrupted():
    """Return a function that runs a handler every 0.2 ms of processor time while a block runs."""
    before = signal.getsignal(signal.SIGVTALRM)

    def start(handler):
        signal.signal(signal.SIGVTALRM, handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0002, 0.0002)

    yield start
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def stop():
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_handler_may_record_and_read(interrupted, kind):
    """Into the metric that is being recorded, folded or read just now: nothing lost, nothing twice."""
    registry = tapes.Registry()
    record = getattr(getattr(registry, kind)("m"), KINDS[kind])
    handled = []

    def handler(number, frame):
        record(1)
        registry.snapshot()
        registry.counter("made.by.a.handler", n=len(handled) % 7).increment()
        handled.append(1)

    interrupted(handler)
    recorded = 0
    deadline = time.monotonic() + 30
    while len(handled) < 150 and time.monotonic() < deadline:
        for _ in range(500):
            record(1)
        recorded += 500
        registry.snapshot()
    stop()
    assert len(handled) >= 150
    assert total(registry, kind) == recorded + len(handled)
    assert sum(one.value for one in registry.snapshot().series("made.by.a.handler")) == len(handled)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before 3.11 a signal may come between two statements")
@pytest.mark.skipif(platform.python_implementation() != "CPython", reason="that is CPython's guarantee")
@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_raises_loses_no_event_and_counts_none_twice(interrupted, kind):
    """As a worker's time-out does: only the event that it interrupts may be missing."""
    registry = tapes.Registry()
    record = getattr(getattr(registry, kind)("m"), KINDS[kind])

    class TimedOut(Exception):
        pass

    armed = [False]

    def handler(number, frame):
        if armed[0]:
            armed[0] = False
            raise TimedOut

    interrupted(handler)
    attempts = completed = raised = 0
    deadline = time.monotonic() + 30
    while raised < 150 and time.monotonic() < deadline:
        try:
            armed[0] = True
            while True:
                attempts += 1
                record(1)
                completed += 1
        except TimedOut:
            raised += 1
    armed[0] = False
    stop()
    assert raised == 150
    assert completed <= total(registry, kind) <= attempts


@pytest.mark.parametrize("kind", KINDS)
def test_destructors_may_record_during_a_collection(kind):
    """Objects in cycles that record when they are collected, wherever that happens, in four threads."""
    registry = tapes.Registry()
    record = getattr(getattr(registry, kind)("m"), KINDS[kind])
    made, threads = 3000, 4

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            record(1)
            registry.counter("gone").increment()

    def make():
        for _ in range(made):
            Cycle()
            record(1)
            registry.snapshot() if _ % 500 == 0 else None

    threshold = gc.get_threshold() if hasattr(gc, "get_threshold") else None
    if threshold:
        gc.set_threshold(10, 2, 2)
    try:
        running = [threading.Thread(target=make) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        if threshold:
            gc.set_threshold(*threshold)
    for _ in range(3):
        gc.collect()
    assert registry.snapshot().get("gone").value == made * threads
    assert total(registry, kind) == 2 * made * threads
