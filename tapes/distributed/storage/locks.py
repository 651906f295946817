"""The lock of an aggregator: a file beside its socket, locked while it lives.

It shows whether an aggregator lives, and whether one that died is to be started again. A lock of ``flock``
ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time

from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressError, AddressInUse

__all__ = ["Lock", "is_kept", "is_served", "needs_restart", "unlock"]

_JOINED, _KEPT = b"joined", b"kept"
_ATTEMPTS = 20


def is_served(endpoints: Endpoints) -> bool:
    """Return whether an aggregator lives there, as its lock tells; ``False`` where there is no file."""
    return _holder_of(endpoints)[0]


def needs_restart(endpoints: Endpoints) -> bool:
    """Return whether an aggregator that workers start by themselves has died there, as its lock tells."""
    lives, joined = _holder_of(endpoints)
    return joined and not lives


def is_kept(endpoints: Endpoints) -> bool:
    """Return whether the aggregator that was there has a parent that starts another one when it is killed."""
    try:
        fd = os.open(endpoints.lock or "", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    with open(fd, "rb") as file:
        return _may_be_ours(os.fstat(fd)) and _KEPT in file.read(40)


def _holder_of(endpoints: Endpoints) -> tuple[bool, bool]:
    """Return whether a process holds the lock, and whether the one that held it last was joined."""
    if endpoints.lock is None:
        return False, False
    try:
        fd = os.open(endpoints.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False, False
    try:
        if not _may_be_ours(os.fstat(fd)):
            return False, False
        joined = _JOINED in os.pread(fd, 40, 0)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, joined
    except OSError:
        return False, False
    finally:
        unlock(fd)
    return False, joined


def _may_be_ours(found: os.stat_result) -> bool:
    """Return whether a lock's file is one that this user made; root meets with services of other users."""
    return stat.S_ISREG(found.st_mode) and os.geteuid() in (0, found.st_uid)


def _lock_soon(fd: int) -> None:
    """Lock ``fd``, or raise BlockingIOError; those who ask whether it is locked hold it for a moment."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(0.005)


def unlock(fd: int) -> None:
    """Give back a lock of ``flock`` and close its file.

    Closing alone is not enough: a child that was forked meanwhile has the file open too.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


class Lock:
    """Held by the one aggregator that serves an address; gone with it, however it ends.

    A file beside the socket, locked with ``flock``; it holds the pid of the owner, whether workers are to
    start another one when it dies, and whether its parent does so before them. An abstract socket or a TCP
    port needs none: there the kernel refuses the second.

    Attributes:
        left_by_crash: Whether who held it last died, and is to be replaced.
    """

    def __init__(self, endpoints: Endpoints, *, joined: bool = False, kept: bool = False) -> None:
        self._endpoints = endpoints
        self._path = endpoints.lock
        self._joined = joined
        self._kept = kept
        self.left_by_crash = False
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock, and clear away what a killed predecessor left.

        Raises:
            AddressInUse: If a living aggregator holds it.
            AddressError: If there is no such directory, or something there that is not a socket.
        """
        if self._path is None:
            return
        try:
            while self._fd < 0:
                self._fd = self._open(self._path)
            self.left_by_crash = _JOINED in os.pread(self._fd, 40, 0)
            self._clear()
            self._sign()
        except OSError as error:
            self.release(expect_successor=self.left_by_crash)
            raise AddressError(
                f"the aggregator can't bind {self._endpoints.publish} ({error.strerror or error})",
                remedy="choose a directory that exists and that this user alone can write to",
            ) from None
        except AddressError:
            self.release(expect_successor=self.left_by_crash)
            raise

    @property
    def is_lost(self) -> bool:
        """Whether the locked file was removed, as by a cleaner of temporary directories, or replaced."""
        if self._fd < 0 or self._path is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
        except OSError:
            return True

    def at(self, endpoints: Endpoints) -> Lock:
        """Return such a lock at ``endpoints``, which is yet to be acquired."""
        return Lock(endpoints, joined=self._joined, kept=self._kept)

    def let_go(self) -> None:
        """Close the locked file, which is lost."""
        if self._fd >= 0:
            unlock(self._fd)
            self._fd = -1

    def _sign(self) -> None:
        """Write whose it is; over what is there, as on a full disk there is no other room."""
        text = b"%d\n%s" % (os.getpid(), _JOINED if self._joined else b"")
        text += b"\n" + _KEPT if self._kept else b""
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))

    def release(self, *, expect_successor: bool = False) -> None:
        """Give the lock back, if it is held; its file stays if workers are to miss who held it."""
        if self._fd >= 0 and self._path is not None:
            if not expect_successor:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
            unlock(self._fd)
            self._fd = -1

    def _open(self, path: str) -> int:
        """Return the descriptor of the locked file, or -1 if it was removed meanwhile."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _may_be_ours(os.fstat(fd)):
                os.close(fd)
                raise PermissionError(f"{path} belongs to another user")
            _lock_soon(fd)
            owner = os.pread(fd, 20, 0).partition(b"\n")[0]
            if owner and not owner.isdigit():
                os.close(fd)
                raise AddressError(
                    f"the aggregator can't bind {self._endpoints.publish}: {path} is somebody's file",
                    remedy="choose another address, or remove that file",
                )
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except BlockingIOError:
            holder = os.read(fd, 20).decode("ascii", "replace").partition("\n")[0]
            os.close(fd)
            raise AddressInUse(
                f"another aggregator{holder and f' (pid {holder})'} serves {self._endpoints.publish}",
                remedy="choose another address, or stop that one",
            ) from None
        os.close(fd)
        return -1

    def _clear(self) -> None:
        for path in self._endpoints.files:
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISSOCK(mode):
                raise AddressError(
                    f"the aggregator can't bind {self._endpoints.publish}: {path} is not a socket",
                    remedy="choose another address, or remove that file",
                )
            os.unlink(path)
