"""Addresses: what is allowed, what they stand for, and what may be bound.

An address names two endpoints: the one that states are published to, and, derived from it, the one for
reads (``….read`` beside an IPC socket, the next port for TCP). ZeroMQ checks little of this itself: it
truncates long paths, steals the socket of a living server, replaces plain files, and resolves relative paths
anew after each ``chdir``. Hence the checks here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
from ipaddress import ip_address
from typing import NamedTuple

from tapes.errors import AddressError, AddressInUse

__all__ = ["DEFAULT_ADDR", "Endpoints", "Lock", "is_served", "resolve", "unlock"]


class _DefaultAddress(str):
    """The default, told from an equal address that was given explicitly."""

    __slots__ = ()


DEFAULT_ADDR: str = _DefaultAddress("ipc://tapes_metrics.ipc")
"""Stands for ``TAPES_ADDR`` from the environment; for itself if that isn't set."""

_MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""What fits into ``sockaddr_un``; Linux has 108 bytes, one of them for the final zero."""


_LOCK = ".lock"


class Endpoints(NamedTuple):
    """Where an aggregator listens.

    Attributes:
        publish: Where states are published to; also the address as a whole.
        read: Where reads and goodbyes are sent to.
        path: The socket's file, or ``None`` where there is none.
    """

    publish: str
    read: str
    path: str | None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that ZeroMQ makes for these endpoints."""
        return (self.path, self.path + ".read") if self.path else ()


def resolve(addr: str | None) -> Endpoints:
    """Return the endpoints of ``addr``, made absolute against the working directory of now.

    Args:
        addr: ``ipc://PATH``, or ``tcp://HOST:PORT`` on loopback; `DEFAULT_ADDR` or ``None`` for
            ``TAPES_ADDR``.

    Raises:
        AddressError: If the address can't be used.
    """
    if addr is None or addr is DEFAULT_ADDR:
        addr = os.environ.get("TAPES_ADDR") or str(DEFAULT_ADDR)
    scheme, separator, rest = addr.partition("://") if isinstance(addr, str) else ("", "", "")
    if separator and rest and scheme == "ipc":
        return _ipc(addr, rest)
    if separator and rest and scheme == "tcp":
        return _tcp(addr, rest)
    raise AddressError(
        "the aggregator's address can't be used",
        got=addr,
        expected="ipc://PATH or tcp://127.0.0.1:PORT",
        remedy="give another socket_addr, or set TAPES_ADDR",
    )


def _ipc(addr: str, path: str) -> Endpoints:
    if path.startswith("@"):
        return Endpoints(addr, addr + ".read", None)
    path = os.path.abspath(path)
    length = len(os.fsencode(path + ".read"))
    if length > _MAX_PATH_BYTES:
        raise AddressError(
            f"the path of an IPC socket has {length} bytes, with '.read'",
            got=path,
            expected=f"at most {_MAX_PATH_BYTES}",
            remedy="use a shorter directory",
        )
    return Endpoints(f"ipc://{path}", f"ipc://{path}.read", path)


def _tcp(addr: str, rest: str) -> Endpoints:
    host, _, port = rest.rpartition(":")
    bare = host.strip("[]")
    try:
        loopback = bare == "localhost" or ip_address(bare).is_loopback
    except ValueError:
        loopback = False
    if not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65535:
        raise AddressError(
            "the aggregator's port can't be used", got=addr, expected="a number from 1 to 65534"
        )
    if not loopback:
        raise AddressError(
            "the aggregator listens on this machine only",
            got=addr,
            expected="a loopback address such as tcp://127.0.0.1:PORT",
        )
    return Endpoints(addr, f"tcp://{host}:{int(port) + 1}", None)


def is_served(endpoints: Endpoints) -> bool:
    """Return whether an aggregator lives there, as its lock tells; ``False`` where there is no file."""
    if endpoints.path is None:
        return False
    try:
        fd = os.open(endpoints.path + _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        unlock(fd)
    return False


def unlock(fd: int) -> None:
    """Give back a lock of ``flock`` and close its file.

    Closing alone is not enough: a child that was forked meanwhile has the file open too.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


class Lock:
    """Held by the one aggregator that serves an address; gone with it, however it ends.

    A file beside the socket, locked with ``flock``; it holds the pid of the owner. An abstract socket or a
    TCP port needs none: there the kernel refuses the second.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._path = endpoints.path + _LOCK if endpoints.path else None
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
            self._clear()
            os.ftruncate(self._fd, 0)
            os.write(self._fd, b"%d\n" % os.getpid())
        except OSError as error:
            self.release()
            raise AddressError(
                f"the aggregator can't bind {self._endpoints.publish} ({error.strerror or error})",
                remedy="choose a directory that exists and can be written to",
            ) from None
        except AddressError:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back and remove its file; nothing if it isn't held."""
        if self._fd >= 0 and self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            unlock(self._fd)
            self._fd = -1

    def _open(self, path: str) -> int:
        """Return the descriptor of the locked file, or -1 if it was removed meanwhile."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = os.pread(fd, 20, 0).strip()
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
            holder = os.read(fd, 20).decode("ascii", "replace").strip()
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
