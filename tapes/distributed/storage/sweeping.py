"""Removing the private directories of services whose processes were all killed.

The next aggregator to start removes them: at once if all processes of the service were in this pid namespace.
A directory for temporary files may be on a volume that several containers share, where the same pid means
different processes. So a directory that another namespace may use is removed by its age.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

from tapes import processes, service
from tapes.distributed.storage.locks import unlock
from tapes.distributed.storage.runtime_directory import START_LOCK, open_private, remove_files
from tapes.distributed.storage.saved_journal import read_journal
from tapes.errors import TapesError, WireError
from tapes.processes import lives
from tapes.service import SOCKET

# Minimum age of a directory that is removed although its service may run in another pid namespace. A living
# aggregator sets the time of a file every 10 s. After its death a worker starts another one; that can take
# long, for example where only the end of a request does it.
_LEFT_SECONDS = 3600.0
_SKEW_SECONDS = 2.0  # a file's time may be that far ahead: file systems have their own clocks and rounding


def sweep() -> None:
    """Remove the directories of this user's services that ended without cleaning up."""
    for parent in service.parents():
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(parent)):
                root = service.root_of(entry.name)
                if root is not None and not lives(root):
                    with contextlib.suppress(OSError, TapesError):
                        _sweep(entry.path)


def _sweep(directory: str) -> None:
    if not service.is_private(directory) or _may_be_used(directory):
        return
    locks = []
    try:
        with open_private(directory, os.geteuid()) as fd:
            for name in os.listdir(fd):
                if name.endswith((".lock", START_LOCK)):
                    locks.append(os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd))
                    fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is held
        remove_files(directory)
        os.rmdir(directory)
    finally:
        for lock in locks:
            unlock(lock)


def _may_be_used(directory: str) -> bool:
    """Return whether a service may still use a directory whose root process is not of this namespace."""
    living = None
    with contextlib.suppress(WireError):
        saved = read_journal(os.path.join(directory, SOCKET))
        # Workers that outlive their root process start another aggregator.
        living = None if saved is None else saved.lives(processes.host_id())
    return _age_of(directory) < _LEFT_SECONDS if living is None else living


def _age_of(directory: str) -> float:
    with open_private(directory, os.geteuid()) as fd:
        now, ages = time.time(), []
        for name in (*os.listdir(fd), "."):
            with contextlib.suppress(FileNotFoundError):
                ages.append(now - os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime)
                if ages[-1] < -_SKEW_SECONDS:  # a time in the future, as the clock was set back
                    os.utime(name, dir_fd=fd, follow_symlinks=False)
        return max(0.0, min(ages))
