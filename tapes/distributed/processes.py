"""Processes: whether they still live, whatever becomes of their pids.

A pidfd reports every kind of death at once. Where there are none (macOS), the pid is asked for.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from math import inf

from tapes.forks import Process, process_of, program_of

__all__ = ["ProcessWatch", "is_same_boot", "lives", "namespace_seconds", "reaps"]


_PROGRAM_SECONDS = 1.0
"""Seconds from one look at what a process runs to the next: no event reports an ``exec``."""


class ProcessWatch:
    """Tells when a process has ended, or has become another program.

    Args:
        process: The process.
        program: What it runs; see `tapes.forks.program_of`. 0 if that does not matter.
    """

    def __init__(self, process: Process, program: int = 0) -> None:
        self._process = process
        self._program = program
        self._looked = 0.0
        self._fd = -1
        self._over = False
        try:
            self._fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._over = True
        except (AttributeError, OSError):
            pass  # no pidfds on this system, or no descriptors left: ended() asks for the pid
        if not self._over and not _is_still(process):  # the pid is another process's by now
            self._over = True

    def ended(self) -> bool:
        """Return whether it has ended."""
        if not self._over:
            if self._fd >= 0:
                poll = select.poll()
                poll.register(self._fd, select.POLLIN)
                self._over = bool(poll.poll(0))
            else:
                self._over = not lives(self._process)
        if not self._over and self._program and time.monotonic() - self._looked >= _PROGRAM_SECONDS:
            self._looked = time.monotonic()
            self._over = program_of(self._process.pid) not in (0, self._program)
        return self._over

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lives(process: Process) -> bool:
    """Return whether ``process`` lives; not if another one has its pid, or it has only to be reaped."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return _is_still(process)


def reaps(pid: int) -> bool:
    """Return whether process ``pid`` may be one that reaps children which it has not started.

    The kernel gives it the children of processes that have ended. It learns of their end by SIGCHLD: it
    handles that, or blocks it and waits for it, or ignores it, and then the kernel reaps them. One that has
    several threads may wait in one of them.
    """
    handles = 1 << (signal.SIGCHLD - 1)
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        signals = (int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt"))
        return int(fields["Threads"]) > 1 or any(found & handles for found in signals)
    except (OSError, KeyError, ValueError):
        return True


def is_same_boot(host: str, other: str) -> bool:
    """Return whether two hosts (`tapes.forks.host`) are pid namespaces of one running system."""
    return host.partition("/")[0] == other.partition("/")[0]


def namespace_seconds() -> float:
    """Return how long ago this pid namespace began, which is when its process 1 did; infinite if not known.

    The kernel gives the number of a namespace that has ended to the next one: `tapes.forks.host` of a
    container that was restarted may be what it was before.
    """
    started = process_of(1).started
    if not started:
        return inf
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _is_still(process: Process) -> bool:
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{process.pid}/stat", "rb") as file:
        if file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X"):
            return False
    started = process_of(process.pid).started
    return not (started and process.started) or started == process.started
