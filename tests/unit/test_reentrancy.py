"""Recording from signal handlers, from destructors, and when a handler raises: exact, and never stuck."""

from __future__ import annotations

import gc
import os
import platform
import signal
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
    # What is raised in a collection is swallowed, in the callback of hypothesis or of a weak reference.
    callbacks = getattr(gc, "callbacks", [])  # which PyPy has not
    kept = callbacks[:]
    callbacks.clear()
    gc.collect()
    gc.disable()

    def start(handler):
        signal.signal(signal.SIGVTALRM, handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0002, 0.0002)

    yield start
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)
    callbacks.extend(kept)
    gc.enable()


def stop():
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_handler_may_record_and_read(interrupted, kind):
    """A handler records into a metric that is recorded, folded or read: no event is lost or doubled."""
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


@pytest.mark.skipif(platform.python_implementation() != "CPython", reason="that is CPython's guarantee")
@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_raises_loses_no_event_and_counts_none_twice(interrupted, kind):
    """When a handler raises anywhere, as for a timeout, only the event that it interrupts may be missing."""
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
    free = []
    lock = next(registry.metrics())._lock
    other = threading.Thread(target=lambda: free.append(lock.acquire(timeout=1)))
    other.start()
    other.join()
    assert free == [True]  # a lock that is left held would stop every other thread


@pytest.mark.parametrize("kind", KINDS)
def test_destructors_may_record_during_a_collection(kind):
    """Objects in cycles record when they are collected, in four threads, and every event counts."""
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


def interrupt(metric, interruption):
    """Let ``interruption(metric)`` run at the end of the first batch that ``metric`` absorbs."""
    absorb, done = type(metric)._absorb, []

    def interrupted(self, state, values):
        state = absorb(self, state, values)
        if not done:
            done.append(True)
            interruption(self)
        return state

    metric.__class__ = type("Interrupted", (type(metric),), {"__slots__": (), "_absorb": interrupted})


class TimedOut(Exception):
    pass


@pytest.mark.parametrize("bad", [None, "x", float("nan"), True], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_a_handlers_exception_goes_on_whatever_is_in_the_batch(kind, bad):
    """A handler's exception passes through also if the batch has a bad value; the good ones count once."""
    registry = tapes.Registry()
    metric = getattr(registry, kind)("m")
    absorb, calls = type(metric)._absorb, []

    def interrupted(self, state, values):
        calls.append(values)
        if len(calls) == 1:
            raise TimedOut
        return absorb(self, state, values)

    metric.__class__ = type("Interrupted", (type(metric),), {"__slots__": (), "_absorb": interrupted})
    for value in (1, 1, bad, 1):
        getattr(metric, KINDS[kind])(value)
    with pytest.raises(TimedOut):
        metric.collect()
    assert total(registry, kind) == (4 if bad is True else 3)
    assert len(registry.snapshot().series("tapes.rejected")) == (0 if bad is True else 1)


@pytest.mark.parametrize("kind", ["counter", "meter", "histogram", "timer"])
def test_taking_from_within_a_fold_takes_each_event_once(kind):
    """A drain that interrupts a fold, as from a signal handler, loses no event and takes none twice."""
    registry = tapes.Registry()
    metric = getattr(registry, kind)("m")
    taken = []
    interrupt(metric, lambda metric: taken.append(metric.drain()))
    for _ in range(300):
        getattr(metric, KINDS[kind])(1)
    metric.collect()
    both = [state.series((), 0).fields() for state in (taken[0], metric.collect())]
    assert sum(fields.get("count", fields.get("value")) for fields in both) == 300


class Slow:
    """A number whose conversion waits for an event."""

    def __init__(self):
        self.folding, self.go_on = threading.Event(), threading.Event()

    def __float__(self):
        self.folding.set()
        self.go_on.wait(30)
        return 1.0


@pytest.fixture
def folding():
    """Return a histogram whose lock is held by another thread."""
    histogram, slow = tapes.Registry().histogram("h"), Slow()
    histogram.update(slow)
    thread = threading.Thread(target=histogram.collect)
    thread.start()
    assert slow.folding.wait(30)
    yield histogram
    slow.go_on.set()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_folds_records_and_reads(folding):
    """A child that was forked during a fold of another thread records and reads: it replaces the lock."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            del folding._buffer[:]
            for _ in range(1000):
                folding.update(2.0)
            status = 0 if folding.collect().sketch.count == 1000 else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_lock_of_another_process_is_replaced_by_whoever_finds_it(folding):
    """A lock of another process is replaced by the first fold: servers that fork in C run no hooks."""
    folding._pid = -1
    del folding._buffer[:]
    for _ in range(1000):
        folding.update(2.0)
    assert len(folding._buffer) < 1000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_from_within_a_fold_counts_each_event_once_in_both():
    """After a fork within a fold, as of a signal handler, parent and child both finish their fold exactly."""
    counter = tapes.Registry().counter("c")
    pids = []

    def fork(metric):
        pids.append(os.fork())
        if pids == [0]:
            for _ in range(500):
                metric.increment()

    interrupt(counter, fork)
    for _ in range(100):
        counter.increment()
    total = counter.collect().up.value
    if pids == [0]:
        os._exit(0 if total >= 500 and counter.total_state().up.value == 600 else 1)
    assert (total, os.waitpid(pids[0], 0)[1]) == (100, 0)


def test_a_fork_before_a_fold_has_begun_is_as_one_from_within():
    """A fork just before a fold detaches the pending values: they are inherited, and not the child's own."""
    counter = tapes.Registry().counter("c")
    aside = []

    class Buffer(list):
        looks = 0

        def __len__(self):  # which collect() asks first, and then the fold
            self.looks += 1
            if self.looks == 2:
                aside.append(counter.detach_inherited())
            return super().__len__()

    counter._buffer = counter._pending = Buffer([1, 1, 1])
    assert counter.collect().counted == 0
    assert aside[0].collect().counted == 3
    assert counter.total_state().counted == 3
