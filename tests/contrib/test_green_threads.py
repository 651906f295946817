"""Programs under gevent and eventlet count exactly and never hang, whenever they patch the threads."""

from __future__ import annotations

import pathlib
import sys

import pytest

TAPES = str(pathlib.Path(sys.executable).with_name("tapes"))
PROGRAM = """
import os, sys
library, patched, joins = sys.argv[1:]

def patch_at(moment):
    if patched != moment:
        return
    if library == "gevent":
        import gevent.monkey
        gevent.monkey.patch_all()
    else:
        import eventlet
        eventlet.monkey_patch()

patch_at("first")
import tapes
patch_at("imported")
counter = tapes.counter("n")
counter.increment()
patch_at("recorded")
if joins == "join":
    tapes.join()
patch_at("joined")
if joins == "join":
    tapes.get_stats()
patch_at("read")

import threading, time

def work():
    for _ in range(10):
        counter.increment()
        time.sleep(0.001)

workers = [threading.Thread(target=work) for _ in range(5)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
pid = os.fork()
if pid == 0:
    counter.increment(100)
    sys.exit(0)
os.waitpid(pid, 0)
deadline = time.monotonic() + 10
while tapes.get_stats().n.value != 151 and time.monotonic() < deadline:
    time.sleep(0.02)
print("counted", tapes.get_stats().n.value)
"""


@pytest.mark.parametrize("patched", ["first", "imported", "recorded", "joined", "read"])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_threads_and_children_count_whenever_the_program_is_patched(home, library, patched):
    """Green threads and forked children count exactly, whenever gevent or eventlet patches the program."""
    pytest.importorskip(library)
    _, output, errors = home.run([sys.executable, "-W", "ignore", "-c", PROGRAM, library, patched, "join"])
    assert output == "counted 151\n", errors


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_a_program_of_greenlets_counts_under_tapes_run(home, library):
    """A program of green threads is counted exactly under ``tapes run``."""
    pytest.importorskip(library)
    (home.directory / "program.py").write_text(PROGRAM)
    command = [TAPES, "run", "--", sys.executable, "-W", "ignore", "program.py", library, "first", "run"]
    status, output, errors = home.run(command)
    assert (status, output) == (0, "counted 151\n"), errors


PRODUCES = """
import os, sys
library, joins = sys.argv[1:]
if library == "gevent":
    import gevent.monkey
    gevent.monkey.patch_all()
else:
    import eventlet
    eventlet.monkey_patch()
import time, tapes

def produce():
    time.sleep(0.001)
    return 1

def hang():
    time.sleep(3600)

tapes.gauge("g", produce)
tapes.gauge("hangs", hang)
if joins == "join":
    tapes.join()

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def read(times):
    for _ in range(times):
        assert tapes.get_stats().g.value == 1
        time.sleep(0.05)

read(40)
before = descriptors()
read(60)
print("left open", descriptors() - before)
os._exit(0)  # without waiting for the producer that hangs
"""


@pytest.mark.parametrize("joins", ["join", "local"])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_producers_that_wait_leave_no_open_descriptor(home, library, joins):
    """Gauge producers that wait or hang in a green thread leave no descriptor open and block no read."""
    pytest.importorskip(library)
    _, output, errors = home.run([sys.executable, "-W", "ignore", "-c", PRODUCES, library, joins])
    assert output == "left open 0\n", errors
