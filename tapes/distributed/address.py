"""Addresses: what is allowed, what they stand for, and what may be bound.

An address names two endpoints: the one that states are published to, and, derived from it, the one for
reads (``….read`` beside an IPC socket, the next port for TCP). ZeroMQ checks little of this itself: it
truncates long paths, steals the socket of a living server, replaces plain files, and resolves relative paths
anew after each ``chdir``. Hence the checks here.

The kernel guards the file of an IPC socket. TCP has no such guard: see `tapes.distributed.curve`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import sys
import time
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from tapes.distributed.curve import HOW_TO_MAKE_ONE, KeyFile
from tapes.errors import AddressError, AddressInUse

__all__ = [
    "DEFAULT_ADDR",
    "Endpoints",
    "Lock",
    "is_kept",
    "is_served",
    "misses_aggregator",
    "resolve",
    "unlock",
]


class _DefaultAddress(str):
    """The default, told from an equal address that was given explicitly."""

    __slots__ = ()


DEFAULT_ADDR: str = _DefaultAddress("ipc://tapes_metrics.ipc")
"""Stands for ``TAPES_ADDR`` from the environment; for itself if that isn't set."""

_MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""What fits into ``sockaddr_un``; Linux has 108 bytes, one of them for the final zero."""

_NAME = re.compile(r"(?!(.*\.)?(\d+|0x[\da-f]*)\.?$)[\w.-]+", re.ASCII | re.IGNORECASE)
"""A host's name; resolvers take what ends in a number for an address, ``0`` and ``127.1`` too."""

_JOINED, _KEPT = b"joined", b"kept"
_ATTEMPTS = 20


class Endpoints(NamedTuple):
    """Where an aggregator listens.

    Attributes:
        publish: Where states are published to; also the address as a whole.
        read: Where reads and goodbyes are sent to.
        path: The socket's file, or ``None`` where there is none.
        key: The file of the key that both ends have to hold, or ``None`` for none.
    """

    publish: str
    read: str
    path: str | None
    key: KeyFile | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files that ZeroMQ makes for these endpoints."""
        return (self.path, self.path + ".read") if self.path else ()

    @property
    def lock(self) -> str | None:
        """The file that the aggregator has locked while it lives, or ``None`` where there is none."""
        return self.path + ".lock" if self.path else None

    def ready(self) -> Endpoints:
        """Return these, of which the key file was read and is in order.

        Raises:
            AddressError: If it isn't.
        """
        if self.key is not None:
            self.key.pair()
        return self


def resolve(addr: str | None) -> Endpoints:
    """Return the endpoints of ``addr``, made absolute against the working directory of now.

    Args:
        addr: ``ipc://PATH``, or ``tcp://HOST:PORT``, beyond loopback with ``TAPES_CURVE_KEY`` only;
            `DEFAULT_ADDR` or ``None`` for ``TAPES_ADDR``.

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
    if not (port.isascii() and port.isdigit() and len(port) <= 5) or not 0 < int(port) < 65535:
        raise AddressError(
            "the aggregator's port can't be used", got=addr, expected="a number from 1 to 65534"
        )
    ip = _ip(host)
    if host == "*" or (ip is not None and ip.is_unspecified):
        raise AddressError(
            "workers can't connect to a wildcard",
            got=addr,
            expected="an address that they reach, such as tcp://127.0.0.1:PORT",
            remedy="give the address of one of this machine's interfaces",
        )
    if ip is None and not _NAME.fullmatch(host):
        raise AddressError(
            "the aggregator's host can't be used",
            got=addr,
            expected="an IPv4 address, an IPv6 address in brackets, or a host's name",
        )
    key = KeyFile.told()
    if key is None and not (host == "localhost" if ip is None else ip.is_loopback):
        raise AddressError(
            "without a key the aggregator listens on this machine only",
            got=addr,
            expected="a loopback address such as tcp://127.0.0.1:PORT, or a key file in TAPES_CURVE_KEY",
            remedy=HOW_TO_MAKE_ONE,
        )
    return Endpoints(addr, f"tcp://{host}:{int(port) + 1}", None, key)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address that ``host`` is, if it is one: the IPv4 address, where it is an IPv6 one's."""
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        ip = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        return None
    if ip.version == 6:
        return (ip.ipv4_mapped or ip) if bracketed else None
    return ip


def is_served(endpoints: Endpoints) -> bool:
    """Return whether an aggregator lives there, as its lock tells; ``False`` where there is no file."""
    return _holder_of(endpoints)[0]


def misses_aggregator(endpoints: Endpoints) -> bool:
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
        is_missed: Whether who held it last died, and is to be replaced.
    """

    def __init__(self, endpoints: Endpoints, *, joined: bool = False, kept: bool = False) -> None:
        self._endpoints = endpoints
        self._path = endpoints.lock
        self._joined = joined
        self._kept = kept
        self.is_missed = False
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
            self.is_missed = _JOINED in os.pread(self._fd, 40, 0)
            self._clear()
            self._sign()
        except OSError as error:
            self.release(to_be_missed=self.is_missed)
            raise AddressError(
                f"the aggregator can't bind {self._endpoints.publish} ({error.strerror or error})",
                remedy="choose a directory that exists and that this user alone can write to",
            ) from None
        except AddressError:
            self.release(to_be_missed=self.is_missed)
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

    def release(self, *, to_be_missed: bool = False) -> None:
        """Give the lock back, if it is held; its file stays if workers are to miss who held it."""
        if self._fd >= 0 and self._path is not None:
            if not to_be_missed:
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
