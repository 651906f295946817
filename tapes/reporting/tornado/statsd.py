"""Metrics to StatsD, on the schedule of a Tornado IOLoop."""

from __future__ import annotations

from datetime import timedelta

from tornado.ioloop import IOLoop

from tapes.registry import Registry
from tapes.reporting.statsd import StatsdClient
from tapes.reporting.tornado import TornadoScheduledReporter

__all__ = ["TornadoStatsdReporter"]


class TornadoStatsdReporter(TornadoScheduledReporter):
    """Reports what `tapes.reporting.statsd.StatsdReporter` does, on the schedule of an IOLoop.

    Sending is done in a thread, so it never blocks the loop.

    Args:
        interval, host, port, prefix, registry, tags, protocol: As there.
        io_loop: The loop; the current one of `start` if ``None``.
    """

    def __init__(
        self,
        interval: timedelta,
        host: str = "localhost",
        port: int = 8125,
        prefix: str | None = None,
        registry: Registry | None = None,
        *,
        io_loop: IOLoop | None = None,
        tags: bool = False,
        protocol: str = "udp",
    ) -> None:
        super().__init__(interval, registry, io_loop)
        self.client = StatsdClient(host, port, prefix, tags, protocol)

    def report(self) -> None:
        """Send all values once; raises `OSError` if something can't be sent."""
        self.client.send(self)

    def _release(self) -> None:
        self.client.close()
