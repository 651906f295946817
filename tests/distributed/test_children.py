"""Child processes of every kind are counted exactly, whichever process reads."""

from __future__ import annotations

import sys

import pytest

METHODS = ["fork", "spawn", "forkserver"]


def run(home, program: str, *arguments: str, **environment: str) -> str:
    """Run a program from a file, as multiprocessing needs it, and return its output."""
    (home.directory / "program.py").write_text(program)
    status, output, errors = home.run([sys.executable, "program.py", *arguments], **environment)
    assert status == 0, errors
    assert "Traceback" not in errors, errors
    home.errors = errors
    return output


HEAD = """
import multiprocessing, os, sys, threading, time, tapes
n = tapes.counter("n")

def work(times=1):
    for _ in range(times):
        n.increment()

def run(method, target=work, *arguments):
    child = multiprocessing.get_context(method).Process(target=target, args=arguments)
    child.start()
    child.join()
    until = time.monotonic() + 10
    while child.exitcode is None and time.monotonic() < until:
        time.sleep(0.001)  # another thread's start() has reaped it, and has not set its status yet
    assert child.exitcode == 0, child.exitcode

def count():
    return tapes.get_stats().get("n", {}).get("value", 0)

def wait_for(number):
    until = time.monotonic() + 10
    while count() != number and time.monotonic() < until:
        time.sleep(0.02)
    return count()
"""


@pytest.mark.parametrize("address", ["", "ipc://here.ipc"])
def test_children_of_a_fork_server_older_than_the_join_are_counted(home, address):
    """Children of a fork server that started before the join count, though its environment is older."""
    program = f"""{HEAD}
if __name__ == "__main__":
    run("forkserver", time.sleep, 0)
    tapes.join({address or None!r})
    for _ in range(3):
        run("forkserver")
    print(count())
"""
    assert run(home, program) == "3\n"


@pytest.mark.parametrize("method", METHODS)
def test_a_parent_that_never_joined_reads_the_service_of_its_children(home, method):
    """A parent that never called join() reads its children's service, of which there is only one."""
    program = f"""{HEAD}
def joins():
    tapes.join()
    work(10)

if __name__ == "__main__":
    work(1)
    for _ in range(3):
        run({method!r}, joins)
    print(count(), len(tapes.get_stats().tapes.workers))
"""
    assert run(home, program) == "31 2\n"
    assert home.errors.count("listens at") == 1


@pytest.mark.parametrize("method", METHODS)
def test_pool_processes_older_than_the_join_are_counted(home, method):
    """Processes of a pool that started before their parent joined count, with events before and after it."""
    program = f"""{HEAD}
def job(_):
    work(10)

def probe(_):
    tapes.counter("probes").increment()
    time.sleep(0.01)  # so that each process gets one of the probes

def live():
    return tapes.get_stats().tapes.workers['{{state="live"}}'].value

if __name__ == "__main__":
    pool = multiprocessing.get_context({method!r}).Pool(2)
    pool.map(job, range(4))
    tapes.join()
    until = time.monotonic() + 10
    while live() < 3 and time.monotonic() < until:
        pool.map(probe, range(4))  # a process that records looks for a service once a second
    pool.map(job, range(4))
    pool.close()
    pool.join()
    print(count())
"""
    assert run(home, program) == "80\n"


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_outlive_the_target_of_a_child_are_counted(home, method):
    """Events of threads that outlive the target of a multiprocessing child are counted."""
    program = f"""{HEAD}
from concurrent.futures import ThreadPoolExecutor

def job():
    time.sleep(0.02)
    work()

def leaves_threads():
    pool = ThreadPoolExecutor(2)
    for _ in range(10):
        pool.submit(job)
    for _ in range(5):
        threading.Thread(target=job).start()

if __name__ == "__main__":
    tapes.join()
    for _ in range(2):
        run({method!r}, leaves_threads)
    print(count())
"""
    assert run(home, program) == "30\n"


def test_events_of_exit_handlers_after_the_goodbye_are_counted(home):
    """Exit handlers registered before tapes was imported run after the goodbye; their events count."""
    program = """
import atexit, os, sys

def late():
    import tapes
    for _ in range(20):
        tapes.counter("n").increment()
    tapes.counter("made.late").increment(5)
    tapes.histogram("h").update(3)

if "child" in sys.argv:
    atexit.register(late)
import tapes
if "child" in sys.argv:
    tapes.counter("n").increment()
    tapes.join()
    tapes.counter("n").increment()
else:
    import subprocess
    tapes.join()
    subprocess.run([sys.executable, "program.py", "child"], check=True)
    stats = tapes.get_stats()
    print(stats.n.value, stats.made.late.value, stats.h["count"])
"""
    assert run(home, program) == "22 5 1\n"


def test_100000_events_after_the_goodbye_take_less_than_ten_seconds(home):
    """100,000 events in an exit handler after the goodbye take no round trip each: less than 10 s in all."""
    program = """
import atexit, sys, time

def late():
    import tapes
    started = time.monotonic()
    for _ in range(100_000):
        tapes.counter("n").increment()
    print(time.monotonic() - started < 10)

atexit.register(late)
import tapes
tapes.join()
tapes.counter("n").increment()
"""
    assert run(home, program) == "True\n"


def test_a_grandchild_that_joins_meets_its_ancestors_service(home):
    """Children and grandchildren that join meet the same service, whichever process joins first."""
    program = f"""{HEAD}
def joins():
    tapes.join()
    work(10)
    run("fork", grandchild)

def grandchild():
    tapes.join()
    work(100)

if __name__ == "__main__":
    for method in {METHODS}:
        run(method, joins)
    tapes.join()
    print(count())
"""
    assert run(home, program) == "330\n"
    assert home.errors.count("listens at") == 1


def test_children_forked_while_their_process_joins_are_counted(home):
    """Children that other threads fork before, during and after a join are all counted."""
    program = f"""{HEAD}
def forks():
    for _ in range(40):
        run("fork", work, 3)

if __name__ == "__main__":
    os.environ["TAPES_ADDR"] = f"ipc://{{os.getcwd()}}/here.ipc"
    threads = [threading.Thread(target=forks) for _ in range(4)]
    threads.insert(2, threading.Thread(target=tapes.join))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(wait_for(480))
"""
    assert run(home, program) == "480\n"
