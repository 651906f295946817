"""Children that close all descriptors, like daemons, shells and terminals, are not aborted by 0MQ."""

from __future__ import annotations

import sys

import pytest


def run(home, program: str) -> str:
    (home.directory / "program.py").write_text(program)
    status, output, errors = home.run([sys.executable, "program.py"])
    assert status == 0, errors
    return output


@pytest.mark.parametrize("has_producer", [False, True])
def test_a_child_that_closes_everything_and_executes_another_program(home, has_producer):
    """None of 100 children is aborted, whether or not it inherits a gauge with a producer."""
    program = f"""
import os, tapes
tapes.counter("n").increment()
if {has_producer}:
    tapes.gauge("g", lambda: 1)
tapes.join()
codes = []
for _ in range(100):
    pid = os.fork()
    if pid == 0:
        os.closerange(3, 4096)
        os.execv("/bin/true", ["true"])
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(codes.count(0), tapes.get_stats().n.value)
"""
    assert run(home, program) == "100 1\n"


DAEMON = """
import os, sys, time, tapes
steps = tapes.counter("steps")
tapes.gauge("alive").set(1)
tapes.join()
steps.increment()
receiver, sender = os.pipe()
if os.fork():  # the process that started it
    assert os.read(receiver, 4) == b"done"
    until = time.monotonic() + 5
    while tapes.get_stats().steps.value != 1 + 50 and time.monotonic() < until:
        time.sleep(0.02)
    print(tapes.get_stats().steps.value)
    sys.exit()
os.setsid()
if os.fork():
    os._exit(0)
os.dup2(sender, 200)
os.closerange(0, 200)
for number in range(3):
    assert os.open(os.devnull, os.O_RDWR) == number
files = [os.open("program.py", os.O_RDONLY) for _ in range(30)]
for _ in range(50):
    steps.increment()
    time.sleep(0.02)
assert all(os.pread(fd, 10, 0) for fd in files)  # each is still the one that was opened
os.write(200, b"done")
"""


def test_a_daemon_that_closes_everything_after_joining_keeps_counting(home):
    """A daemon that forks twice and closes all descriptors counts in each step; its own files stay open."""
    assert run(home, DAEMON) == "51\n"


def test_a_child_that_closes_everything_with_a_reporter_of_its_parent(home):
    """A child does not close a second time the connection that its parent's StatsD reporter had."""
    program = """
import os, socket, sys, time, tapes
from datetime import timedelta
from tapes.reporting.statsd import StatsdReporter
receiver = socket.create_server(("127.0.0.1", 0))
reporter = StatsdReporter(timedelta(hours=1), "127.0.0.1", receiver.getsockname()[1], protocol="tcp")
tapes.counter("n").increment()
reporter.report()
pid = os.fork()
if pid == 0:
    os.closerange(3, 4096)
    files = [os.open("program.py", os.O_RDONLY) for _ in range(30)]
    tapes.counter("n").increment()
    reporter.report()
    os._exit(0 if all(os.pread(fd, 10, 0) for fd in files) else 1)
assert os.waitpid(pid, 0)[1] == 0
print("fine")
"""
    assert run(home, program) == "fine\n"


def test_a_fork_while_other_threads_connect(home):
    """No child waits for a lock that only its parent can release: each of 300 ends, and can connect."""
    program = """
import os, threading, time, tapes
os.environ["TAPES_ADDR"] = f"ipc://{os.getcwd()}/none.ipc"
tapes.counter("c")
stop = threading.Event()

def connects():
    while not stop.is_set():
        registry = tapes.DistributedRegistry(f"ipc://{os.getcwd()}/other.ipc")
        registry.counter("x")
        registry.connect()
        registry.close()

threads = [threading.Thread(target=connects, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
hung = 0
for number in range(300):
    pid = os.fork()
    if pid == 0:
        if number % 3 == 0:
            tapes.connect()
        os._exit(0)
    limit = time.monotonic() + 20
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > limit:
            hung += 1
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    if hung:
        break
print(hung)
os._exit(0)
"""
    assert run(home, program).endswith("0\n")
