"""Requests in flight, and what waits for their end: a fork, a move of the aggregator, and a close."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tapes import threads
from tapes.distributed.transport.requests import TIMEOUT_SECONDS
from tapes.errors import AggregatorUnavailable


class Gate(threads.Monitor):
    """Lets requests pass unless it is closed, after the end of a pause; its lock guards both states."""

    def __init__(self) -> None:
        super().__init__()
        self._in_flight = 0
        self.is_paused = self.is_closed = False

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request in flight; raises AggregatorUnavailable if closed, or paused for too long."""
        with self:
            self.wait_for(lambda: not self.is_paused, TIMEOUT_SECONDS)
            if self.is_closed or self.is_paused:
                raise AggregatorUnavailable("the connection is being closed")
            self._in_flight += 1
        try:
            yield
        finally:
            with self:
                self._in_flight -= 1

    def is_idle(self, wait_seconds: float = 0.0) -> bool:
        """Wait until no request is in flight; return whether none is."""
        with self:
            return self.wait_for(lambda: not self._in_flight, wait_seconds)

    def close(self) -> bool:
        """Let no request pass any more; return whether this call has closed it."""
        with self:
            if self.is_closed:
                return False
            self.wait_for(lambda: not self.is_paused, TIMEOUT_SECONDS)
            self.is_closed = True
            return True
