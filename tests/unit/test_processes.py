"""tapes.processes: which process is which, and whether it lives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tapes.processes import reaps


@pytest.mark.parametrize(
    ("how", "is_one"),
    [
        ("pass", False),
        ("signal.signal(signal.SIGCHLD, lambda *_: None)", True),
        ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", True),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})", True),
        ("threading.Thread(target=sys.stdin.read).start()", True),
    ],
)
def test_a_process_that_reaps_children_is_recognised_by_its_signals(how, is_one):
    """reaps() is true for a process that can notice the end of a child, and where that is not known."""
    program = f"import signal, sys, threading; {how}; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert reaps(process.pid) is is_one
        process.kill()
    assert reaps(process.pid)
