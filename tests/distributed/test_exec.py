"""A process that executes another program, or itself again, is another worker with the same pid."""

from __future__ import annotations

import sys

from tests.processes import connected, wait_for


def run(home, program: str) -> str:
    (home.directory / "program.py").write_text(program)
    status, output, errors = home.run([sys.executable, "program.py"])
    assert status == 0, errors
    return output


def test_a_process_that_executes_itself_again_is_one_worker(home):
    """A process that executes itself again, as reloaders do, is one live worker with all its counts.

    Its gauges are those of the last program.
    """
    program = """
import os, sys, time, tapes
number = len(sys.argv)
tapes.gauge("size").set(5)
tapes.gauge("limit", merge="max").set(10 - number)
tapes.gauge("each", merge="each").set(number)
tapes.counter("starts").increment()
tapes.join()
before = tapes.get_stats()  # a read publishes this process's events first
if number < 4:
    os.execv(sys.executable, [sys.executable, *sys.argv, "again"])
stats = tapes.get_stats()
print(stats.size.value, stats.limit.value, stats.starts.value, len(stats.each),
      stats.tapes.workers['{state="live"}'].value, stats.tapes.workers['{state="retired"}'].value <= 3)
"""
    assert run(home, program) == "5 6 4 1 1 True\n"


def test_gauges_of_a_process_that_executes_a_program_without_tapes_are_removed(home):
    """If a process executes a program without tapes, its gauges are removed within 10 s; its counts stay."""
    address = f"ipc://{home.directory}/m.ipc"
    program = f"""
import os, time, tapes
tapes.gauge("size").set(5)
tapes.counter("n").increment(3)
tapes.join({address!r})
tapes.get_stats()
print("up", flush=True)
os.execv("/bin/sleep", ["sleep", "600"])
"""
    (home.directory / "program.py").write_text(program)
    with home.running([sys.executable, "program.py"]) as process:
        wait_for(lambda: (home.directory / "m.ipc.read").exists(), "the aggregator listens")
        with connected(address) as reader:

            def left() -> bool:
                stats = reader.get_stats()
                return stats.get("n", {}).get("value") == 3 and not stats.get("size")

            wait_for(left, "the gauge has left, and the count is there", 10)
            assert process.poll() is None


def test_forked_children_and_further_registries_are_workers_of_their_own(home):
    """A forked child and each connected registry of a process count as live workers of their own."""
    program = """
import os, sys, time, tapes
tapes.gauge("size").set(1)
tapes.join()
other = tapes.DistributedRegistry(os.environ["TAPES_ADDR"])
other.gauge("size").set(10)
other.connect()
other.get_stats()
receiver, sender = os.pipe()
pid = os.fork()
if pid == 0:
    tapes.gauge("size").set(100)
    tapes.get_stats()
    os.write(sender, b"x")
    time.sleep(60)
os.read(receiver, 1)
stats = tapes.get_stats()
print(stats.size.value, stats.tapes.workers['{state="live"}'].value)
os.kill(pid, 9)
os.waitpid(pid, 0)
"""
    assert run(home, program) == "111 3\n"  # the registry that the child did not use has no connection
