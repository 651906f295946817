"""The spool: goodbyes of workers that exited while no aggregator answered.

Each goodbye is a file beside the socket. It is written completely or not at all, and the aggregator removes
it after reading it. The name contains the worker's identity, so reading a goodbye twice does no harm.
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

_log = logging.getLogger("tapes.distributed")

SUFFIX = ".spool-"  # follows the path of the socket in the name of each file
_TICK_SECONDS = 0.5  # maximum resolution of a file system's modification times


def write(endpoints: Endpoints, goodbye: Goodbye) -> bool:
    """Write a goodbye to the spool; return whether that succeeded."""
    if endpoints.path is None:
        return False
    path = _path(endpoints.path, goodbye)
    draft = f"{path}.{os.getpid()}"
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(encode(goodbye))
        os.replace(draft, path)
    except (OSError, WireError):  # the disk is full, or the message is too long
        with contextlib.suppress(OSError):
            os.unlink(draft)
        return False
    return True


def write_all(endpoints: Endpoints, goodbyes: list[Goodbye]) -> None:
    """Write goodbyes to the spool; log a warning if one can't be written."""
    written = [write(endpoints, goodbye) for goodbye in goodbyes]
    if not all(written):
        _log.warning(
            "tapes lost what this process recorded since it last published: no aggregator answered at %s, "
            "and no file could be written beside its socket",
            endpoints.publish,
        )


def discard(endpoints: Endpoints, goodbye: Goodbye) -> None:
    """Remove a goodbye from the spool, if it is there: the aggregator has acknowledged it."""
    if endpoints.path is not None:
        with contextlib.suppress(OSError):
            os.unlink(_path(endpoints.path, goodbye))


def _path(socket_path: str, goodbye: Goodbye) -> str:
    return socket_path + SUFFIX + goodbye.update.identity.hex()


class Spool:
    """The spool beside a socket, for its aggregator; lists the directory only after a change."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._directory, _, name = (endpoints.path or "").rpartition("/")
        self._prefix = name + SUFFIX
        self._changed: int | None = None
        self._settles_at = 0.0

    def drain(self) -> Iterator[tuple[Goodbye | WireError, bytes]]:
        """Yield each goodbye, or the error in it, and its bytes; remove its file after that."""
        if not self._directory:
            return
        with contextlib.suppress(OSError):
            changed = os.stat(self._directory).st_mtime_ns
            if changed != self._changed:
                # A later change within one clock tick of the file system leaves the same time.
                self._changed, self._settles_at = changed, time.monotonic() + _TICK_SECONDS
            elif time.monotonic() > self._settles_at:
                return
            for entry in list(os.scandir(self._directory)):
                if entry.name.startswith(self._prefix) and "." not in entry.name[len(self._prefix) :]:
                    yield from self._read(entry.path)

    def remove(self) -> None:
        """Remove all files: they belong to another service, which has ended."""
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self._directory)):
                if entry.name.startswith(self._prefix):
                    with contextlib.suppress(OSError):  # another user's file
                        os.unlink(entry.path)

    def _read(self, path: str) -> Iterator[tuple[Goodbye | WireError, bytes]]:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
                    return  # any user can put a file into a shared directory
                data = file.read(min(MAX_BYTES, found.st_size))  # read() allocates its argument first
            try:
                message = decode(data)
                if not isinstance(message, Goodbye):
                    raise WireError("a spooled message", got=type(message).__name__, expected="Goodbye")
            except WireError as error:
                yield error, data
            else:
                yield message, data
            os.unlink(path)
