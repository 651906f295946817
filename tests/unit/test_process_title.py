"""tapes.distributed.supervision.process_title: the command line of a process in ps."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tapes.distributed.supervision import process_title

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is shown elsewhere")

PROGRAM = """
import ctypes, os, runpy, subprocess, sys
title = runpy.run_path(sys.argv[1])["set_title"]

def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

def ps(what):
    return run("ps", "-ww", "-o", what + "=", "-p", str(os.getpid()))

def in_c(name):
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return os.fsdecode(getenv(name.encode()))

before = dict(os.environ)
for text in sys.argv[2:]:
    title(text)
    assert ps("args") == text, (ps("args"), text)
    assert ps("comm") == "tapes-aggr", ps("comm")
    assert dict(os.environ) == before
    assert all(in_c(name) == value for name, value in before.items())
    assert run(sys.executable, "-c", "import os; print(dict(os.environ))") == repr(before)
print("done")
"""


@pytest.mark.needs("ps")
@pytest.mark.parametrize("texts", [["tapes aggregator"], ["x" * 3000], ["x" * 3000, "short", "y" * 2500]])
def test_ps_shows_the_title_and_the_environment_stays(texts, tmp_path):
    """ps shows titles shorter and longer than the command line; the environment variables stay the same."""
    program = tmp_path / "p.py"
    program.write_text(PROGRAM)
    padding = {f"PADDING_{n}": "p" * 1000 for n in range(8)}  # what a long title overwrites
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_CTYPE": "C.UTF-8", **padding}
    done = subprocess.run(
        [sys.executable, str(program), process_title.__file__, *texts],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


def test_a_system_without_proc_is_no_error(monkeypatch):
    """Where /proc does not exist, setting the title does nothing."""

    def fail(path, mode):
        raise FileNotFoundError(path)

    before = pathlib.Path("/proc/self/cmdline").read_bytes()
    monkeypatch.setattr(process_title, "open", fail, raising=False)
    process_title.set_title("tapes")
    assert pathlib.Path("/proc/self/cmdline").read_bytes() == before
