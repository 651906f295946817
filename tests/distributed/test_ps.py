"""ps shows an operator which processes are aggregators, and of which service."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.needs("ps")

PS = """
import subprocess

def ps():
    shown = subprocess.run(["ps", "-ww", "-eo", "pid,comm,args"], capture_output=True, text=True, check=True)
    return [line.split(None, 2) for line in shown.stdout.splitlines() if "tapes-" in line or "m.ipc" in line]
"""
JOINED = (
    PS
    + """
import os, tapes
tapes.join()
tapes.counter("a").increment()
address = os.environ["TAPES_ADDR"]
for line in ps():
    if address in line[2]:
        print(line[1], line[2].replace(address, "ADDRESS"))
"""
)
BY_HAND = (
    PS
    + """
import os, sys, tapes
from tapes.distributed.registry import RegistryAggregator
aggregator = RegistryAggregator([], "ipc://m.ipc")
aggregator.start()
here = os.getcwd()
for line in sorted(ps(), key=lambda line: int(line[0])):
    if f"ipc://{here}/m.ipc" in line[2]:
        print(line[1], line[2].replace(here, "HERE"))
aggregator.stop()
"""
)


def shown(home, program):
    (home.directory / "p.py").write_text(program)
    status, output, errors = home.run([sys.executable, "-W", "error", "p.py"])
    assert status == 0, errors
    return output.splitlines()


def test_an_aggregator_that_a_service_starts_is_shown_with_its_address(home):
    """The command line of an aggregator that join() starts contains its address."""
    (line,) = shown(home, JOINED)
    assert line == "tapes-aggr tapes aggregator ADDRESS, started for the process itself"


def test_a_forked_aggregator_and_its_supervisor_are_shown_with_their_address(home):
    """Both processes of RegistryAggregator.start() show the address, after a fork of a short command."""
    assert shown(home, BY_HAND) == [
        "tapes-aggr tapes aggregator supervisor ipc://HERE/m.ipc",
        "tapes-aggr tapes aggregator ipc://HERE/m.ipc",
    ]
