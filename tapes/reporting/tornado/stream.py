"""Metrics as lines of JSON to a stream, on the schedule of a Tornado IOLoop."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TextIO

from tornado.ioloop import IOLoop

from tapes.registry import Registry
from tapes.reporting.stream import write_line
from tapes.reporting.tornado import TornadoScheduledReporter

__all__ = ["TornadoStreamReporter"]


class TornadoStreamReporter(TornadoScheduledReporter):
    """Writes all values to a stream as one line of JSON, on the schedule of an IOLoop.

    Writing is done in a thread, so it never blocks the loop.

    Args:
        interval: The time between lines; a ``timedelta``.
        stream: A text stream.
        registry: What to report; the default registry if ``None``.
        io_loop: The loop; the current one of `start` if ``None``.
    """

    def __init__(
        self,
        interval: timedelta,
        stream: TextIO = sys.stdout,
        registry: Registry | None = None,
        io_loop: IOLoop | None = None,
    ) -> None:
        super().__init__(interval, registry, io_loop)
        self.stream = stream

    def report(self) -> None:
        """Write one line."""
        write_line(self.registry, self.stream)
