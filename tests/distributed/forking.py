"""Programs that fork, and how many of their events an aggregator has counted."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from tests.processes import clean_environment, wait_for


def run(program, short_dir, *, seconds=60, **environment):
    """Run a program from a file, as multiprocessing needs it; it must exit with 0 and print no errors."""
    (short_dir / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"], cwd=short_dir, env=clean_environment(**environment),
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def value(reader, name="c"):
    """Return the value of a metric that a registry reads, or ``None``."""
    series = reader.snapshot().get(name)
    return None if series is None else series.value


def assert_counted(reader, number):
    """Wait until ``number`` events are counted, and assert that no unread file of an exit changes that."""
    wait_for(lambda: value(reader) == number, f"{number} are counted")
    directory = pathlib.Path(reader.socket_addr.partition("//")[2]).parent
    wait_for(lambda: not list(directory.glob("*.spool-*")), "no file of an exit is unread")
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
