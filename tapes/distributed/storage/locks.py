"""The aggregator's lock: a file beside its socket, locked with ``flock`` while the aggregator lives.

The kernel releases the lock when the process ends, for whatever reason. The text of the file remains: it
shows whether another aggregator has to be started.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from dataclasses import dataclass

from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressError, AddressInUse

_ATTEMPTS, _PAUSE_SECONDS = 20, 0.005


@dataclass(frozen=True)
class _Holder:
    """The aggregator that holds a lock, or held it last, as its file describes it."""

    pid: bytes = b""  # empty in a new file
    restartable: bool = False  # workers start another aggregator after it dies
    supervised: bool = False  # its parent process does so before them

    @classmethod
    def read(cls, fd: int) -> _Holder:
        text = os.pread(fd, 64, 0)
        return cls(text.partition(b"\n")[0], b"restartable" in text, b"supervised" in text)

    def write(self, fd: int) -> None:
        """Write the text of a lock file, in place: a full disk has no room for another file."""
        text = self.pid + b"\nrestartable" * self.restartable + b"\nsupervised" * self.supervised
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))


def is_served(endpoints: Endpoints) -> bool:
    """Return whether a process holds the lock of ``endpoints``; ``False`` where there is not a lock file."""
    return _inspect(endpoints)[0]


def needs_restart(endpoints: Endpoints) -> bool:
    """Return whether an aggregator at ``endpoints`` has died and workers have to start another one."""
    is_locked, holder = _inspect(endpoints)
    return holder.restartable and not is_locked


def is_supervised(endpoints: Endpoints) -> bool:
    """Return whether the last aggregator at ``endpoints`` has a parent that starts another one."""
    return _inspect(endpoints)[1].supervised


def _inspect(endpoints: Endpoints) -> tuple[bool, _Holder]:
    """Return whether a process holds the lock, and which one holds it or held it last."""
    try:
        fd = os.open(endpoints.lock or "", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False, _Holder()
    try:
        if not _is_trusted(fd):
            return False, _Holder()
        holder = _Holder.read(fd)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, holder
    except OSError:
        return False, _Holder()
    finally:
        unlock(fd)
    return False, holder


def _is_trusted(fd: int) -> bool:
    """Return whether this user made a lock file; root accepts the files of all users."""
    found = os.fstat(fd)
    return stat.S_ISREG(found.st_mode) and os.geteuid() in (0, found.st_uid)


def _lock_soon(fd: int) -> None:
    """Lock ``fd``, or raise BlockingIOError; `_inspect` in another process may hold it for a moment."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(_PAUSE_SECONDS)


def unlock(fd: int) -> None:
    """Release a ``flock`` and close its file."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has the file open too
    os.close(fd)


class Lock:
    """The lock of the one aggregator that serves ``endpoints``; `_Holder` describes the options.

    An abstract socket or a TCP port has no lock file: there the kernel refuses a second aggregator.
    If ``predecessor_crashed``, the last holder died and has to be replaced.
    """

    def __init__(self, endpoints: Endpoints, *, restartable: bool = False, supervised: bool = False) -> None:
        self._endpoints = endpoints
        self._path = endpoints.lock
        self._restartable = restartable
        self._supervised = supervised
        self.predecessor_crashed = False
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock, and remove the sockets of a predecessor that was killed.

        Raises AddressInUse if a living aggregator holds it; AddressError if the directory does not exist, or
        another file has the name of a socket.
        """
        if self._path is None:
            return
        try:
            while self._fd < 0:
                self._fd = self._open(self._path)
            self.predecessor_crashed = _Holder.read(self._fd).restartable
            self._remove_sockets()
            _Holder(b"%d" % os.getpid(), self._restartable, self._supervised).write(self._fd)
        except (OSError, AddressError) as error:
            self.release(keep_file=self.predecessor_crashed)
            if isinstance(error, AddressError):
                raise
            remedy = "choose an existing directory that only this user can write to"
            raise self._error(f" ({error.strerror or error})", remedy) from None

    @property
    def is_lost(self) -> bool:
        """Whether the locked file was removed, as by a cleaner of temporary directories, or replaced."""
        if self._fd < 0 or self._path is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
        except OSError:
            return True

    def moved_to(self, endpoints: Endpoints) -> Lock:
        """Return a lock with the same properties at ``endpoints``; it is not acquired yet."""
        return Lock(endpoints, restartable=self._restartable, supervised=self._supervised)

    def close(self) -> None:
        """Release the lock if it is held, and leave its file as it is."""
        if self._fd >= 0:
            unlock(self._fd)
            self._fd = -1

    def release(self, *, keep_file: bool = False) -> None:
        """Release the lock if it is held; keep its file if workers have to start another aggregator."""
        if self._fd >= 0 and self._path is not None and not keep_file:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self.close()

    def _open(self, path: str) -> int:
        """Return the descriptor of the locked file, or -1 if the file was removed meanwhile."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        is_current = False
        try:
            if not _is_trusted(fd):
                raise PermissionError(f"{path} belongs to another user")
            _lock_soon(fd)
            pid = _Holder.read(fd).pid
            if pid and not pid.isdigit():
                raise self._error(f": {path} is another program's file")
            with contextlib.suppress(FileNotFoundError):
                is_current = os.path.samestat(os.fstat(fd), os.stat(path))
        except BlockingIOError:
            holder = _Holder.read(fd).pid.decode("ascii", "replace")
            raise AddressInUse(
                f"another aggregator{holder and f' (pid {holder})'} serves {self._endpoints.publish}",
                remedy="choose another address, or stop the other aggregator",
            ) from None
        finally:
            if not is_current:
                os.close(fd)
        return fd if is_current else -1

    def _remove_sockets(self) -> None:
        for path in self._endpoints.files:
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISSOCK(mode):
                raise self._error(f": {path} is not a socket")
            os.unlink(path)

    def _error(self, why: str, remedy: str = "choose another address, or remove that file") -> AddressError:
        return AddressError(f"the aggregator can't bind {self._endpoints.publish}{why}", remedy=remedy)
