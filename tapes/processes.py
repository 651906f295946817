"""Processes: what distinguishes them, and whether they still live, whatever becomes of their pids.

A pidfd reports every kind of death at once. Where there are none (macOS), the pid is asked for.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from functools import lru_cache
from math import inf
from typing import NamedTuple

__all__ = [
    "Process", "ProcessWatch", "host_id", "is_same_boot", "lives", "namespace_seconds", "process_of",
    "program_of", "reaps",
]  # fmt: skip


_MAX_PROGRAM = (1 << 62) - 1
_PROGRAM_SECONDS = 1.0
"""Seconds from one look at what a process runs to the next: no event reports an ``exec``."""


class Process(NamedTuple):
    """A process of this host, told from a later one with the same pid.

    Attributes:
        pid: The pid.
        started: When it started, in the kernel's clock ticks since boot; 0 if that is not known.
    """

    pid: int
    started: int


def process_of(pid: int) -> Process:
    """Return the process that has ``pid`` now."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return Process(pid, int(file.read().rpartition(b")")[2].split()[19]))
    except (OSError, IndexError, ValueError):
        return Process(pid, 0)


def program_of(pid: int) -> int:
    """Return a number of the program that a process runs; 0 if that can't be seen.

    A fork does not change it, and ``exec`` does: a process that becomes another program, or itself again, is
    another worker, although its pid and its start stay the same.

    Theory. ``exec`` gives a process a new stack, at a random address, and a new text. The kernel shows where
    they are (``/proc/PID/stat``, fields 26 to 28) to the process itself and to others of its user.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            code, end, stack = map(int, file.read().rpartition(b")")[2].split()[23:26])
    except (OSError, IndexError, ValueError):
        return 0
    return (stack ^ code << 13 ^ end << 29) & _MAX_PROGRAM if stack else 0


@lru_cache(maxsize=1)
def host_id() -> str:
    """Return what pids mean here: the running system, and the namespace that pids are counted in."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


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
