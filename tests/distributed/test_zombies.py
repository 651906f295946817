"""A killed aggregator does not remain as a zombie where process 1 reaps only its own children."""

from __future__ import annotations

import json
import sys

import pytest

from tests.distributed.containers import UNSHARE
from tests.processes import Home

pytestmark = pytest.mark.needs("unshare")

INIT = """
import os, subprocess, sys, time
service = subprocess.Popen([sys.executable, "service.py"])
while not os.path.exists("done"):
    time.sleep(0.02)
"""
"""Process 1: it waits for no child."""

SERVICE = """
import json, os, pathlib, signal, time, tapes

def state(entry):
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""

def zombies():
    processes = [entry for entry in pathlib.Path("/proc").iterdir() if entry.name.isdigit()]
    return [entry.name for entry in processes if state(entry) == "Z"]

def aggregator(lock):
    return int(pathlib.Path(lock).read_text().split()[0])

def counts(number):
    try:
        return tapes.get_stats().n.value == number
    except tapes.TapesError:
        return False

def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

def work():
    tapes.join()
    tapes.counter("n").increment(10)

workers = []
for _ in range(2):
    reader, writer = os.pipe()
    workers.append((os.fork(), writer))
    if workers[-1][0] == 0:
        work()
        for _, one in workers:
            os.close(one)
        os.read(reader, 1)
        tapes.close()
        os._exit(0)
work()
wait_for(lambda: counts(30))
lock = os.environ["TAPES_ADDR"].partition("://")[2] + ".lock"
killed, found = [], []
for number in range(4):
    killed.append(aggregator(lock))
    os.kill(killed[-1], signal.SIGKILL)
    tapes.counter("n").increment()
    wait_for(lambda: counts(31 + number))
    found.append(zombies())
for pid, writer in workers:
    os.close(writer)
    os.waitpid(pid, 0)
wait_for(lambda: counts(34))
print(json.dumps([killed, found, zombies()]), flush=True)
os.rename("doing", "done")
"""
"""A supervisor with two workers; kills the aggregator four times, and looks for zombies after each."""


def test_killed_aggregators_are_reaped(short_dir):
    """Each killed aggregator is replaced, the counts are right, and no zombie remains."""
    home = Home(short_dir)
    (short_dir / "service.py").write_text(SERVICE)
    (short_dir / "doing").touch()
    status, output, errors = home.run([*UNSHARE, sys.executable, "-c", INIT])
    if status and "unshare" in errors:
        pytest.skip(f"no pid namespace can be made: {errors.strip()}")
    killed, found, last = json.loads(output)
    assert len(set(killed)) == 4, errors
    assert found == [[]] * 4, errors
    assert last == []
