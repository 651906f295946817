"""Processes that fork: each event from before and after the fork counts once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.distributed.forking import FORK, assert_counted, run, value
from tests.processes import MAY_FORK_BESIDE_THREADS, clean_environment, run_python, wait_for

# gevent's own threads wait for work in its pool while the process forks.
GEVENT = MAY_FORK_BESIDE_THREADS + "from gevent import monkey; monkey.patch_all()"
needs_gevent = pytest.mark.skipif(not importlib.util.find_spec("gevent"), reason="gevent is not installed")


def test_events_before_the_fork_count_once_while_the_parent_runs(address, reader, short_dir):
    """Seven events from before the fork count once for three children and their parent; so does its gauge."""
    program = (
        FORK.format(address=address)
        + """
def work():
    assert counter.collect().up.value == 0
    counter.increment(1)
    stats = tapes.get_stats()
    assert stats.c.value >= 8 and stats.g.value == 5 and stats.h["count"] == 1, stats

ends(*(child(work) for _ in range(3)))
print(tapes.get_stats().c.value, tapes.get_stats().g.value)
"""
    )
    assert run(program, short_dir) == "7 5\n"
    assert_counted(reader, 10)
    assert reader.get_stats().h["count"] == 1
    wait_for(lambda: value(reader, "g") is None, "the gauge of the dead parent leaves")
    assert value(reader) == 10


def test_later_children_bring_what_their_parent_counted_between_forks(address, reader, short_dir):
    """Each child of a parent without a connection brings what the parent had counted when it was forked."""
    program = (
        FORK.format(address=address)
        + """
ends(child())
counter.increment(3)
ends(child(lambda: counter.increment(100)), child())
counter.increment(20)
"""
    )
    run(program, short_dir)
    assert_counted(reader, 110)


def test_a_parent_that_connects_after_its_children_counts_once(address, reader, short_dir):
    """A parent that connects after its children brought its counts replaces them: each event counts once."""
    program = (
        FORK.format(address=address)
        + f"""
ends(child(lambda: counter.increment(100)))
counter.increment(3)
tapes.connect({address!r})
assert tapes.get_stats().c.value == 110
counter.increment(5)
ends(child(lambda: counter.increment(1000)))
assert tapes.get_stats().c.value == 1115
"""
    )
    run(program, short_dir)
    assert_counted(reader, 1115)


def test_events_of_dead_ancestors_count_once(address, reader, short_dir):
    """Events of a daemon's dead ancestors count once, and its gauges go on from their values."""
    program = (
        FORK.format(address=address)
        + """
if os.fork():
    os._exit(0)
parent = os.getppid()
counter.increment(20)
if os.fork():
    os._exit(0)
counter.increment(300)
assert counter.total_state().up.value == 327, counter.total_state()
assert tapes.get_stats().g.value == 5
gauge.increment(2)
assert tapes.get_stats().g.value == 7
ends(child(), child(lambda: counter.increment(4000)))
"""
    )
    run(program, short_dir)
    wait_for(lambda: value(reader) == 4327, "all generations are counted once")
    wait_for(lambda: value(reader, "g") is None, "the gauges leave")
    assert value(reader) == 4327


def test_children_of_a_connected_parent_connect_without_a_call(address, reader, short_dir):
    """Children of a connected parent connect without a call and start from zero; the parent goes on."""
    program = f"""
import os, sys, threading, tapes
tapes.connect({address!r})
counter = tapes.counter("c")
counter.increment(7)
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        counter.increment(10)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    counter.increment(1)
assert tapes.get_stats().c.value == 227
assert [t.name for t in threading.enumerate()] == ["MainThread", "tapes-publisher"]
"""
    run(program, short_dir)
    assert_counted(reader, 227)


def test_a_child_publishes_what_its_dead_parent_had_not_published(address, reader, short_dir):
    """If a connected parent forks and exits before it publishes, its child publishes the parent's events."""
    program = f"""
import os, sys, tapes
tapes.connect({address!r})
counter = tapes.counter("c")
counter.increment(7)
if os.fork():
    os._exit(0)
counter.increment(20)
"""
    run(program, short_dir)
    wait_for(lambda: value(reader) == 27, "both are counted")


def test_forks_while_other_threads_record_and_read_count_exactly(address, reader, short_dir):
    """Forks while other threads record and read block no child, and both sides are counted exactly."""
    program = f"""
import os, sys, threading, tapes
tapes.connect({address!r})
counter, histogram = tapes.counter("c"), tapes.histogram("h")
stop = threading.Event()
counted = [0, 0, 0]

def record(number):
    while not stop.is_set():
        counter.increment()
        histogram.update(1)
        counted[number] += 1
        if counted[number] % 200 == 0:
            tapes.get_stats()

threads = [threading.Thread(target=record, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for _ in range(30):
    pid = os.fork()
    if pid == 0:
        counter.increment(1_000_000)
        histogram.update(1)
        tapes.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
tapes.close()
print(sum(counted))
"""
    (short_dir / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py"], cwd=short_dir, env=clean_environment(),
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    counted = int(done.stdout)
    assert_counted(reader, 30_000_000 + counted)
    assert reader.get_stats().h["count"] == 30 + counted


def test_a_child_of_a_local_registry_keeps_what_it_inherited(short_dir):
    """A forked child of a registry without an aggregator keeps the inherited counts and gauges."""
    done = run_python(
        """
import os, tapes
registry = tapes.Registry()
registry.counter("c").increment(7)
registry.timer("t").update(1)
registry.gauge("g").set(5)
registry.gauge("h").set(5)
if os.fork():
    assert os.wait()[1] == 0
    raise SystemExit
registry.counter("c").increment(3)
registry.gauge("g").increment()
registry.gauge("h").set(1)
stats = registry.get_stats()
assert (stats.c.value, stats.t["count"], stats.g.value, stats.h.value) == (10, 1, 6, 1), stats
""",
        cwd=short_dir,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_during_a_publication_that_is_delayed_loses_nothing(address, reader, short_dir):
    """A fork while a publication is delayed loses nothing: the parent opens another connection."""
    program = f"""
import os, threading, tapes
tapes.connect({address!r})
tapes.counter("c").increment()
assert tapes.get_stats().c.value == 1
held, release = threading.Event(), threading.Event()

class Slow:
    def __float__(self):
        held.set()
        release.wait(20)
        return 2.0

tapes.histogram("h").update(Slow())
assert held.wait(10)
pid = os.fork()
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
release.set()
tapes.counter("c").increment(11)
assert tapes.get_stats().c.value == 12
"""
    done = run_python(MAY_FORK_BESIDE_THREADS + program, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert_counted(reader, 12)
    assert reader.get_stats().h["count"] == 1


def test_a_fork_during_a_goodbye_counts_nothing_twice(address, reader, short_dir):
    """A child forked while its parent publishes its goodbye counts nothing twice."""
    program = f"""
import os, sys, tapes
tapes.connect({address!r})
for number in range(10):
    tapes.counter("c", n=number).increment()
tapes.get_stats()
taken, take = [], tapes.metrics.Counter.drain

def fork_in_between(metric):
    state = take(metric)
    if len(taken) == 5:
        taken.append(os.fork())
        if taken[-1] == 0:
            tapes.connect({address!r})
            tapes.counter("of.child").increment()
            tapes.close()
            os._exit(0)
        os.waitpid(taken[-1], 0)
    taken.append(metric)
    return state

tapes.metrics.Counter.drain = fork_in_between
tapes.close()
"""
    done = run_python(MAY_FORK_BESIDE_THREADS + program, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert value(reader, "of.child") == 1
    assert [series.value for series in reader.snapshot().series("c")] == [1] * 10


@pytest.mark.parametrize(
    "prologue",
    ["", pytest.param(GEVENT, marks=needs_gevent)],
    ids=["plain", "gevent"],
)
def test_other_programs_can_be_started_by_a_connected_process(address, reader, short_dir, prologue):
    """A connected process can start programs, with a preexec_fn and under gevent too, and loses nothing."""
    run(
        f"""
{prologue}
import subprocess, sys, tapes
counter = tapes.counter("c")
counter.increment(7)
tapes.connect()
assert tapes.get_stats().c.value == 7
for number in range(20):
    counter.increment()
    command = [sys.executable, "-S", "-c", "print(5)"]
    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=lambda: None, close_fds=True)
    assert (done.returncode, done.stdout) == (0, b"5\\n"), done
assert tapes.get_stats().c.value == 27
""",
        short_dir,
        TAPES_ADDR=address,
    )
    assert value(reader) == 27
