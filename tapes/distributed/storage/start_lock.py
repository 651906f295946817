"""The start lock: held while a process starts an aggregator, and while an aggregator exits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator

from tapes import forks
from tapes.distributed.storage.locks import unlock
from tapes.distributed.storage.runtime_directory import START_LOCK, User, private_directory, restore
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressError, AggregatorUnavailable

_MAX_WAIT_SECONDS, _PAUSE_SECONDS = 20.0, 0.01  # to wait for the lock, and between two attempts


@contextlib.contextmanager
def start_lock(endpoints: Endpoints, user: User, *, wait: bool = True) -> Iterator[bool]:
    """Hold the start lock of ``endpoints``; yield whether it is held.

    There is no such lock over TCP: there the kernel lets one aggregator bind. There is none either where
    another user has made its file: then the aggregator's own lock lets one of several aggregators serve.

    ``wait`` until it is free for 20 s at most, as its holder may be stopped. Raises AddressError if there is
    no directory for it, and AggregatorUnavailable if another process holds it for too long.
    """
    if endpoints.path is None:
        yield True
        return
    lock = _StartLock(endpoints, user)
    deadline = time.monotonic() + _MAX_WAIT_SECONDS
    try:
        while not (is_held := lock.take(makes_directory=wait)) and wait:
            if time.monotonic() > deadline:
                raise AggregatorUnavailable(
                    f"another process has not finished starting the aggregator at {endpoints.publish}",
                    remedy=f"see which process has {lock.path} open",
                )
            time.sleep(_PAUSE_SECONDS)  # a lock with a timeout needs a signal or a thread
        yield is_held
    finally:
        lock.close()


class _StartLock:
    def __init__(self, endpoints: Endpoints, user: User) -> None:
        self.path = f"{endpoints.path}{START_LOCK}"
        self._endpoints = endpoints
        self._user = user
        self._fd = -1

    def take(self, *, makes_directory: bool) -> bool:
        """Try once to take the lock; return whether it is held, or can't be a lock."""
        while True:
            self.close()
            # 1. Open the file. If another user has made it, it is not a lock.
            if not self._open(makes_directory) or self._is_foreign(os.fstat(self._fd)):
                return True
            # 2. The processes of the service's user have to lock the file too.
            if self._user != User.ourselves():
                found = os.fstat(self._fd)  # it may be a link that the user made
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid():
                    os.fchown(self._fd, *self._user)
            # 3. Lock it.
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # 4. Begin again if the last holder removed the file meanwhile.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                    return True

    def close(self) -> None:
        """Release the lock, unless a fork has closed the file in this process."""
        if self._fd in _open_locks:
            _open_locks.discard(self._fd)
            unlock(self._fd)
        self._fd = -1

    def _open(self, makes_directory: bool) -> bool:
        """Open the file; return ``False`` if another user's file can't be opened."""
        remedy = "choose a directory that exists and can be written to"
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # an aggregator that exited has removed the directory
            if not makes_directory or private_directory(self._endpoints) is None:
                what = f"there is no directory for {self._endpoints.publish}"
                raise AddressError(what, remedy=remedy) from None
            restore(self._endpoints, self._user)
            return self._open(makes_directory)
        except OSError as error:
            if self._is_foreign(os.lstat(self.path)):
                return False
            what = f"no aggregator can start at {self._endpoints.publish} ({error.strerror or error})"
            raise AddressError(what, remedy=remedy) from None
        _open_locks.add(self._fd)
        return True

    def _is_foreign(self, found: os.stat_result) -> bool:
        return found.st_uid not in (os.geteuid(), self._user.uid)


def _close_locks() -> None:
    """In a forked child, close the files of its parent's locks: they would stay locked after its death."""
    while _open_locks:
        os.close(_open_locks.pop())


_open_locks: set[int] = set()  # descriptors
forks.renew_in_child(_close_locks)
