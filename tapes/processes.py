"""Processes: how to identify one, and whether it still lives, even if its pid is used again.

A pidfd reports every kind of death at once. Systems without pidfds (macOS) check the pid.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from functools import lru_cache
from math import inf
from typing import NamedTuple

_MAX_PROGRAM = (1 << 62) - 1
_PROGRAM_SECONDS = 1.0  # seconds between two checks of the program of a process: no event reports an ``exec``


class Process(NamedTuple):
    """A process of this host; differs from a later one with the same pid."""

    pid: int
    started: int  # the kernel's clock ticks from boot to its start; 0 if not known


def stat_fields(pid: int, *numbers: int) -> list[int]:
    """Return fields of ``/proc/PID/stat`` by their numbers in proc(5); zeros if they can't be read."""
    fields = _stat(pid)
    try:
        return [int(fields[number - 3]) for number in numbers]
    except (IndexError, ValueError):
        return [0] * len(numbers)


def _stat(pid: int) -> list[bytes]:
    """Return the fields of ``/proc/PID/stat`` from the third one: they follow the command's name."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def process_of(pid: int) -> Process:
    """Return the process that has ``pid`` now."""
    return Process(pid, *stat_fields(pid, 22))


def program_of(pid: int) -> int:
    """Return a number that identifies the program of a process; 0 if it can't be seen.

    A fork keeps the number, and ``exec`` changes it. A process that executes a program, even the same one, is
    another worker, although its pid and its start time stay the same.

    Theory. ``exec`` gives a process a new stack, at a random address, and a new text. The kernel shows their
    addresses (``/proc/PID/stat``, fields 26 to 28) to the process itself and to others of its user.
    """
    code, end, stack = stat_fields(pid, 26, 27, 28)
    return (stack ^ code << 13 ^ end << 29) & _MAX_PROGRAM if stack else 0


@lru_cache(maxsize=1)
def host_id() -> str:
    """Return a text for the scope of pids: the running system, and the pid namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


class ProcessWatch:
    """Detects that a process has ended, or executes another program than ``program`` (0 for any)."""

    def __init__(self, process: Process, program: int = 0) -> None:
        self._process, self._program = process, program
        self._checked, self._fd, self._has_ended = 0.0, -1, False
        try:
            self._fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._has_ended = True
        except (AttributeError, OSError):
            pass  # no pidfds on this system, or no descriptors left: ended() checks the pid
        self._has_ended = self._has_ended or not _is_still(process)  # another process may have the pid now

    def ended(self) -> bool:
        """Return whether it has ended."""
        if not self._has_ended:
            if self._fd >= 0:
                poll = select.poll()
                poll.register(self._fd, select.POLLIN)
                self._has_ended = bool(poll.poll(0))
            else:
                self._has_ended = not lives(self._process)
        if not self._has_ended and self._program and time.monotonic() - self._checked >= _PROGRAM_SECONDS:
            self._checked = time.monotonic()
            self._has_ended = program_of(self._process.pid) not in (0, self._program)
        return self._has_ended

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lives(process: Process) -> bool:
    """Return whether ``process`` lives; a zombie does not, nor a process whose pid another one has."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return _is_still(process)


def reaps(pid: int) -> bool:
    """Return whether process ``pid`` may reap children that it has not started.

    The kernel gives it the children of processes that have ended. SIGCHLD informs it of their end: it handles
    the signal, or blocks it and waits for it, or ignores it, and then the kernel reaps the children. A
    process with several threads may wait in one of them.
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
    """Return whether two values of `host_id` are of one running system."""
    return host.partition("/")[0] == other.partition("/")[0]


def namespace_seconds() -> float:
    """Return the seconds since process 1 of this pid namespace started; infinite if not known.

    The kernel reuses the number of a namespace that has ended: `host_id` may be the same before and after the
    restart of a container.
    """
    started = process_of(1).started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK") if started else inf


def _is_still(process: Process) -> bool:
    if _stat(process.pid)[:1] in ([b"Z"], [b"X"]):
        return False
    started = process_of(process.pid).started
    return not (started and process.started) or started == process.started
