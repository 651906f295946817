"""Metrics as lines of JSON, to a stream."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TextIO

from tapes.exposition import render
from tapes.registry import Registry
from tapes.reporting.scheduled import ScheduledReporter

__all__ = ["ThreadedStreamReporter", "write_line"]


class ThreadedStreamReporter(ScheduledReporter):
    """Writes all values to a stream as one line of JSON, from a thread.

    A line is what ``get_stats()`` returns, as of one moment, and is written in one call.

    Args:
        interval: The time between lines; a ``timedelta``.
        stream: A text stream.
        registry: What to report; the default registry if ``None``.

    Example:
        >>> import io, tapes, datetime
        >>> registry, stream = tapes.Registry(), io.StringIO()
        >>> registry.counter("jobs.done").increment(3)
        >>> with ThreadedStreamReporter(datetime.timedelta(minutes=1), stream, registry):
        ...     pass  # a line at the start, and one at the end
        >>> stream.getvalue().splitlines()[-1]
        '{"jobs": {"done": {"value": 3}}}'
    """

    def __init__(
        self, interval: timedelta, stream: TextIO = sys.stdout, registry: Registry | None = None
    ) -> None:
        super().__init__(interval, registry)
        self.stream = stream

    def report(self) -> None:
        """Write one line."""
        write_line(self.registry, self.stream)


def write_line(registry: Registry, stream: TextIO) -> None:
    """Write all values of ``registry`` as one line of JSON, and flush it."""
    stream.write(render(registry, "json").decode())
    stream.flush()
