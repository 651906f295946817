"""A flag that every forked child finds unset, even if the fork ran no hook."""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

_WIPE_ON_FORK = 18  # Linux's MADV_WIPEONFORK


def fork_flag() -> Any:
    """Return a byte (index 0) that is zero until this process sets it, and again in each of its children.

    It detects forks in C too, for the cost of reading memory. `os.getpid` is a system call, which costs a
    request as much as recording it.

    Theory: the kernel gives a child zeros for pages that are advised so (MADV_WIPEONFORK, Linux 4.14).
    """
    if sys.implementation.name == "pypy":  # it exits where the kernel refuses the advice
        return _PidFlag()
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_WIPE_ON_FORK)
    except (AttributeError, OSError, ValueError):
        return _PidFlag()
    return page


class _PidFlag:
    """The same where the system has no such pages."""

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, index: int) -> int:
        return self._pid == os.getpid()

    def __setitem__(self, index: int, value: int) -> None:
        self._pid = os.getpid() if value else 0
