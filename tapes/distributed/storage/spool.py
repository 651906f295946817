"""Wills: the last words of workers that left while no aggregator answered.

A will is a goodbye in a file beside the socket, written whole or not at all, and removed by the aggregator
that takes it in. The identity in its name makes it harmless to read one twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from collections.abc import Iterator

from tapes.distributed.protocol.messages import Goodbye
from tapes.distributed.protocol.wire import MAX_BYTES, decode, encode
from tapes.distributed.transport.address import Endpoints
from tapes.errors import WireError

__all__ = ["MARK", "Wills", "leave", "leave_all", "withdraw"]

_log = logging.getLogger("tapes.distributed")

MARK = ".will-"
_COARSE_SECONDS = 0.5


def leave(endpoints: Endpoints, goodbye: Goodbye) -> bool:
    """Write a will; return whether that could be done."""
    if endpoints.path is None:
        return False
    path = _path(endpoints.path, goodbye)
    draft = f"{path}.{os.getpid()}"
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(encode(goodbye))
        os.replace(draft, path)
    except (OSError, WireError):  # the disk is full, or it is too long
        with contextlib.suppress(OSError):
            os.unlink(draft)
        return False
    return True


def leave_all(endpoints: Endpoints, goodbyes: list[Goodbye]) -> None:
    """Write a will for each; log a warning if one could not be written."""
    left = [leave(endpoints, goodbye) for goodbye in goodbyes]
    if not all(left):
        _log.warning(
            "tapes: no aggregator answered at %s, and no file could be written beside its socket: what this "
            "process had counted since its last publication is lost",
            endpoints.publish,
        )


def withdraw(endpoints: Endpoints, goodbye: Goodbye) -> None:
    """Remove a will, if there is one: what it says was said."""
    if endpoints.path is not None:
        with contextlib.suppress(OSError):
            os.unlink(_path(endpoints.path, goodbye))


def _path(socket_path: str, goodbye: Goodbye) -> str:
    return socket_path + MARK + goodbye.update.identity.hex()


class Wills:
    """The wills beside a socket, as its aggregator sees them; looks again only if the directory changed."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._directory, _, name = (endpoints.path or "").rpartition("/")
        self._start = name + MARK
        self._changed: int | None = None
        self._looks_until = 0.0

    def take_in(self) -> Iterator[tuple[Goodbye | WireError, bytes]]:
        """Yield each new will, or what is wrong with it, and its bytes; it is removed after that."""
        if not self._directory:
            return
        with contextlib.suppress(OSError):
            changed = os.stat(self._directory).st_mtime_ns
            if changed != self._changed:
                # What changes again within the clock tick of the file system has the same time.
                self._changed, self._looks_until = changed, time.monotonic() + _COARSE_SECONDS
            elif time.monotonic() > self._looks_until:
                return
            for entry in list(os.scandir(self._directory)):
                if entry.name.startswith(self._start) and "." not in entry.name[len(self._start) :]:
                    yield from self._open(entry.path)

    def remove(self) -> None:
        """Remove them, as they are those of another service, which has ended."""
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self._directory)):
                if entry.name.startswith(self._start):
                    with contextlib.suppress(OSError):  # another user's
                        os.unlink(entry.path)

    def _open(self, path: str) -> Iterator[tuple[Goodbye | WireError, bytes]]:
        data = b""
        with contextlib.suppress(OSError):
            with open(
                os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb"
            ) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
                    return  # anybody can put a file into a directory that all share
                data = file.read(min(MAX_BYTES, found.st_size))  # read() takes the memory first
            try:
                message = decode(data)
                if not isinstance(message, Goodbye):
                    raise WireError("a will", got=type(message).__name__, expected="Goodbye")
            except WireError as error:
                yield error, data
            else:
                yield message, data
            os.unlink(path)
