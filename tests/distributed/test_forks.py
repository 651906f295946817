"""Processes that fork, are spawned, and end in every way: each event counts once."""

from __future__ import annotations

import importlib.util
import pathlib
import signal
import subprocess
import sys
import threading

import pytest
import zmq

from tapes.distributed.protocol.messages import Reply
from tapes.distributed.protocol.wire import encode
from tapes.distributed.registry import DistributedRegistry
from tests.processes import MAY_FORK_BESIDE_THREADS, clean_environment, run_python, wait_for, zmq_context

# gevent's own threads wait for work in its pool while the process forks.
GEVENT = MAY_FORK_BESIDE_THREADS + "from gevent import monkey; monkey.patch_all()"
needs_gevent = pytest.mark.skipif(not importlib.util.find_spec("gevent"), reason="gevent is not installed")


def run(program, short_dir, *, seconds=60, **environment):
    """Run a program from a file, as multiprocessing needs it; it must end well and say nothing."""
    (short_dir / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"], cwd=short_dir, env=clean_environment(**environment),
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def value(reader, name="c"):
    series = reader.snapshot().get(name)
    return None if series is None else series.value


def assert_counted(reader, number):
    """So many, and no more when all last words have been read."""
    wait_for(lambda: value(reader) == number, f"{number} are counted")
    directory = pathlib.Path(reader.socket_addr.partition("//")[2]).parent
    wait_for(lambda: not list(directory.glob("*.spool-*")), "no last words are unread")
    assert value(reader) == number


FORK = """
import os, signal, sys, time, tapes
counter, gauge = tapes.counter("c"), tapes.gauge("g")
counter.increment(7)
tapes.histogram("h").update(7)
gauge.set(5)

def child(work=lambda: None):
    pid = os.fork()
    if pid == 0:
        try:
            tapes.connect({address!r})
            work()
            tapes.close()
            os._exit(0)
        finally:
            os._exit(1)
    return pid

def ends(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
"""


def test_seven_events_before_the_fork_are_seven_with_the_parent_alive(address, reader, short_dir):
    """Three children tell of the same seven, and count three of their own; so does the value of a gauge."""
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


def test_a_parent_that_counts_on_and_forks_on_is_told_by_its_youngest_child(address, reader, short_dir):
    """Seven, then three more, then the parent itself: each child knows as much as there was."""
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


def test_a_parent_that_connects_at_last_speaks_for_itself(address, reader, short_dir):
    """7 + its own, once, whatever its children said of it."""
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


def test_seven_events_of_a_parent_that_is_dead(address, reader, short_dir):
    """The child goes on alone, as a daemon does; grandchildren too."""
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


def test_children_of_a_connected_parent_connect_by_themselves(address, reader, short_dir):
    """They start from zero; the parent goes on, however often it forks."""
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


def test_a_connected_parent_that_forks_and_dies_at_once(address, reader, short_dir):
    """What it had not published yet is told by its child."""
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


CHILDREN = """
import multiprocessing, os, sys, tapes

def work(number):
    tapes.counter("c").increment(5)
    if number % 2:
        sys.exit(0)

if __name__ == "__main__":
    {connect}
    tapes.counter("c").increment(7)
    context = multiprocessing.get_context({method!r})
    children = [context.Process(target=work, args=(n,)) for n in range({number})]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0, child.exitcode
    tapes.counter("c").increment(3)
"""


@pytest.mark.parametrize("how", ["connected", "TAPES_ADDR"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(address, reader, short_dir, method, how):
    """However they are started: they connect by themselves, and say goodbye when they return or exit."""
    connect = f"tapes.connect({address!r})" if how == "connected" else ""
    environment = {} if how == "connected" else {"TAPES_ADDR": address}
    run(CHILDREN.format(method=method, connect=connect, number=6), short_dir, **environment)
    assert_counted(reader, 40)


@pytest.mark.timeout(300)
def test_400_children_that_live_for_milliseconds(address, reader, short_dir):
    """None is too short to be counted; a parent that is not connected, and then one that is."""
    program = (
        FORK.format(address=address)
        + f"""
for _ in range(10):
    ends(*(child(lambda: counter.increment(1)) for _ in range(20)))
tapes.connect({address!r})
for _ in range(10):
    pids = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            counter.increment(1000)
            sys.exit(0)
        pids.append(pid)
    ends(*pids)
"""
    )
    run(program, short_dir, seconds=240)
    assert_counted(reader, 7 + 200 + 200_000)


def test_workers_that_end_in_four_ways(address, reader, short_dir):
    """Return, sys.exit, close, and SIGKILL after an interval."""
    program = f"""
import multiprocessing, os, signal, sys, time, tapes
tapes.connect({address!r})

def work(how):
    tapes.counter("c").increment(1000)
    if how == "sys.exit":
        sys.exit(0)
    if how == "close":
        tapes.close()
        os._exit(0)
    if how == "kill":
        tapes.get_stats()  # the aggregator has it: an interval has passed
        os.kill(os.getpid(), signal.SIGKILL)

ways = ("return", "sys.exit", "close", "kill")
fork = multiprocessing.get_context("fork")  # others import this program again
children = [fork.Process(target=work, args=(way,)) for way in ways]
for child in children:
    child.start()
for child in children:
    child.join()
assert sorted(child.exitcode for child in children) == [-signal.SIGKILL, 0, 0, 0]
"""
    run(program, short_dir)
    assert_counted(reader, 4000)


def test_a_fork_while_other_threads_record_and_read(address, reader, short_dir):
    """No lock that they hold stops the child; counted exactly on both sides."""
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


def test_a_child_without_an_aggregator_goes_on_with_what_it_inherited(short_dir):
    """As a daemon does that forks twice to be one: nothing is lost in its own view."""
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


def test_a_will_is_left_for_the_next_aggregator(short_dir, start_aggregator):
    """Nobody answers within a second: the last values are in a file, and counted by who comes next."""
    address = f"ipc://{short_dir}/m.ipc"
    early = DistributedRegistry(address)
    early.connect()
    early.counter("c").increment(7)
    early.close()
    (will,) = short_dir.glob("m.ipc.spool-*")
    assert will.stat().st_mode & 0o077 == 0
    (short_dir / "m.ipc.spool-strange").write_bytes(b"garbage")
    with start_aggregator() as process:
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        late = DistributedRegistry(address)
        late.connect()
        wait_for(lambda: value(late) == 7, "the will is read")
        assert late.get_stats().tapes.rejected.value == 1
        assert list(short_dir.glob("*will*")) == []
        process.send_signal(signal.SIGSTOP)
        late.counter("c").increment(3)
        late.close()
        assert len(list(short_dir.glob("*will*"))) == 1
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: not list(short_dir.glob("*will*")), "it is read by the one that goes on")
        late.connect()
        assert late.get_stats().c.value == 10
        late.close()


def test_a_fork_while_a_publication_is_held_up(address, reader, short_dir):
    """By a number that takes its time to become one: the parent opens another connection, and goes on."""
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


def test_a_fork_in_the_middle_of_a_goodbye(address, reader, short_dir):
    """The child speaks of who says goodbye; nothing counts twice."""
    program = f"""
import os, sys, tapes
tapes.connect({address!r})
for number in range(10):
    tapes.counter("c", n=number).increment()
tapes.get_stats()
taken, take = [], tapes.metrics.Counter.take

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

tapes.metrics.Counter.take = fork_in_between
tapes.close()
"""
    done = run_python(MAY_FORK_BESIDE_THREADS + program, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert value(reader, "of.child") == 1
    assert [series.value for series in reader.snapshot().series("c")] == [1] * 10


def test_a_refused_goodbye_is_not_forgotten(short_dir):
    """It is left as a will."""
    address = f"ipc://{short_dir}/m.ipc"
    with zmq_context() as context:
        router = context.socket(zmq.ROUTER)
        router.bind(address + ".read")
        refusal = encode(Reply(0, "error", b"no"))
        refuse = threading.Thread(target=lambda: router.send_multipart([router.recv_multipart()[0], refusal]))
        refuse.start()
        registry = DistributedRegistry(address)
        registry.connect()
        registry.counter("c").increment()
        registry.close()
        refuse.join()
    assert len(list(short_dir.glob("*.spool-*"))) == 1


@pytest.mark.parametrize(
    "prologue",
    ["", pytest.param(GEVENT, marks=needs_gevent)],
    ids=["plain", "gevent"],
)
def test_other_programs_can_be_started_by_a_connected_process(address, reader, short_dir, prologue):
    """Forks that another program follows, with hooks of Python between: it runs, and nothing is lost."""
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
