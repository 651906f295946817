"""Sessions of real processes: what comes between connecting, leaving, forking and the exit."""

from __future__ import annotations

from tests.distributed.forking import value
from tests.processes import run_python, wait_for


def test_another_thread_may_connect_while_the_process_leaves(address, reader, short_dir):
    """What is recorded after that is counted, once."""
    program = f"""
import tapes, threading, time
tapes.connect({address!r})
counter = tapes.counter("c")
counter.increment(1000)
tapes.get_stats()
stop = threading.Event()

def connect():
    while not stop.is_set():
        tapes.connect({address!r})

thread = threading.Thread(target=connect)
thread.start()
tapes.default_registry.session.leave()
stop.set()
thread.join()
for _ in range(20):
    counter.increment()
tapes.close()
"""
    for runs in (1, 2, 3):
        done = run_python(program, cwd=short_dir)
        assert (done.returncode, done.stderr) == (0, "")
        assert value(reader) == runs * 1020


def test_values_of_an_exit_handler_that_closes_are_counted(address, reader, short_dir):
    """tapes.close() after the goodbye changes nothing: what is recorded later is flushed."""
    program = f"""
import atexit

@atexit.register  # before the import of tapes, so it runs after the goodbye
def last():
    tapes.close()
    counter.increment(7)

import tapes
tapes.connect({address!r})
counter = tapes.counter("c")
counter.increment(1000)
tapes.get_stats()
"""
    done = run_python(program, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert value(reader) == 1007


def test_a_child_that_records_nothing_reports_what_its_dead_parent_recorded(address, reader, short_dir):
    """The parent ended by os._exit; its child is the last process that knows the values."""
    program = f"""
import os, sys, tapes
counter = tapes.counter("c")
os.environ["TAPES_ADDR"] = {address!r}
receiver, sender = os.pipe()
if os.fork() == 0:
    counter.increment(5)
    if os.fork():
        os._exit(0)
    os.close(sender)
    os.read(receiver, 1)  # until the others are gone
    sys.exit(0)
os.wait()
os._exit(0)
"""
    done = run_python(program, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    wait_for(lambda: value(reader) == 5, "the grandchild has reported")


def test_a_signal_handler_may_make_a_metric_while_the_process_connects(address, reader, short_dir):
    """connect() ends, and the handler's value counts."""
    program = f"""
import os, signal, tapes
import tapes.distributed.worker.connected as connected
os.environ["TAPES_ADDR"] = {address!r}
signal.signal(signal.SIGUSR1, lambda *_: tapes.counter("c").increment())
incarnation = connected.incarnation

def interrupted(endpoints):
    os.kill(os.getpid(), signal.SIGUSR1)
    return incarnation(endpoints)

connected.incarnation = interrupted
tapes.connect({address!r})
connected.incarnation = incarnation
assert tapes.get_stats().c.value >= 1
tapes.close()
"""
    done = run_python(program, cwd=short_dir, TAPES_ADDR=address)
    assert (done.returncode, done.stderr) == (0, "")
    assert value(reader) >= 1
