"""The pipe between a starting aggregator and its starter."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
from typing import Any

from tapes import errors, threads
from tapes.errors import AddressError, AggregatorUnavailable, InvalidArgument

_READY_SECONDS = 10.0
_END = b"\0"
_ERRORS = AddressError, AggregatorUnavailable, InvalidArgument  # what a report can name, with subclasses


class Readiness:
    """The pipe on which a starting aggregator reports that it is ready, or why it can't start.

    ``fds`` are the two ends, -1 for one that this process does not have; by default, those of a new pipe.
    The starting process needs the descriptor ``sender``.
    """

    NOT_READY, CRASHED = 1, 2
    """Exit statuses of an aggregator: it could not start; it failed later."""

    def __init__(self, fds: tuple[int, int] | None = None) -> None:
        self._receiver, self.sender = map(_above_standard_streams, os.pipe()) if fds is None else fds
        self.has_reported = False
        self._failure = f"the aggregator was not ready within {_READY_SECONDS:g} s"

    def wait(self) -> None:
        """Wait until the aggregator is ready, or raise the error that it reports."""
        self.close_writer()
        text = b""
        # select() supports no descriptors above 1023. gevent's poll() would leave an event loop behind in a
        # native thread; eventlet has no poll().
        is_native = threads.in_native_thread() or not hasattr(select, "poll")
        poll = threads.unpatched("select", "poll")() if is_native else select.poll()
        poll.register(self._receiver, select.POLLIN)
        try:
            # Don't wait for the end of the pipe: a child that was forked meanwhile may hold it open.
            while not text.endswith(_END) and poll.poll(_READY_SECONDS * 1000):
                piece = os.read(self._receiver, 65536)
                text += piece
                if not piece:
                    self._failure = "the aggregator died before it was ready"
                    break
        finally:
            self.close_reader()
        kind, _, message = text.rstrip(_END).decode(errors="replace").partition("\n")
        if kind != "ready":
            error: Any = getattr(errors, kind, None)
            is_known = isinstance(error, type) and issubclass(error, _ERRORS)
            raise (error if is_known else AggregatorUnavailable)(message or self._failure)

    def close_reader(self) -> None:
        if self._receiver >= 0:
            os.close(self._receiver)
            self._receiver = -1

    def close_writer(self) -> None:
        """Close this process's copy of the aggregator's end: the pipe ends when the aggregator dies."""
        if self.sender >= 0:
            os.close(self.sender)
            self.sender = -1

    def close(self) -> None:
        self.close_writer()
        self.close_reader()

    def report(self, text: str) -> None:
        """Send ``text`` to the starting process; only the first report is sent."""
        self.has_reported = True
        with contextlib.suppress(OSError):  # no process waits, or no longer
            os.write(self.sender, text.encode() + _END)
        self.close_writer()


def _above_standard_streams(fd: int) -> int:
    """Return ``fd`` if it is none of the standard streams, which may be closed; else move it."""
    if fd > 2:
        return fd
    higher = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return higher
