"""Cursors: what a receiver of differences, such as StatsD, was sent so far.

Theory. Such a receiver adds up what it gets and forgets it when it restarts. So a reporter sends how much
each count has grown since its last report, and the cursor keeps that count. It moves when a packet is sent,
so a failed send loses nothing and sends nothing twice.

The count of a whole service also changes without an event: a worker removes a series, or a count turns out to
be the baseline of a worker that an earlier aggregator knew (`tapes.metrics.origin`). Such a change is no
growth, and the cursor moves without a report. After a crash of the aggregator counts may be missing for a
while. Then the cursor stays where it is, as they will be back.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tapes.naming import Labels
from tapes.sums import Number

Series = tuple[str, Labels]

_WAIT_SECONDS = 1.0  # maximum seconds that a report waits for another one to the same receiver


class Sent(NamedTuple):
    """A count at the time of a report."""

    value: Number  # what was added less what was taken away
    total: Number  # what was added
    baseline: Number = 0  # how much of the value earlier aggregators had
    created: float = 0.0  # 0 in an aggregator, where a series goes on when a worker removes it

    def is_behind(self, last: Sent) -> bool:
        """Return whether it has less than ``last`` besides its baseline: some of the total is missing."""
        grown = self.total - last.total
        return self.created == last.created and (grown < 0 or grown < self.baseline - last.baseline)

    def since(self, last: Sent | None) -> Number:
        """Return how much to send if ``last`` was sent, or nothing."""
        if last is None or self.created != last.created:
            return self.value - self.baseline
        return self.value - last.value - (self.baseline - last.baseline)


class Unsaved(OSError):
    """A move of a cursor can't be saved, so its counts wait for the next report."""


class Cursor:
    """What one receiver was sent of a registry; one report at a time reads and moves it.

    Args:
        may_lag: Returns whether counts may be missing that were sent before.
        save: Saves a move for a later process; returns whether that was possible.

    Attributes:
        skips_history: Whether everything counted so far is not to be sent.
    """

    skips_history = False

    def __init__(
        self,
        may_lag: Callable[[], bool] = lambda: False,
        save: Callable[[Mapping[Series, Sent | None]], bool] = lambda changes: True,
    ) -> None:
        self.may_lag = may_lag
        self._save = save
        self._sent: dict[Series, Sent] = {}
        self._lock, self._changing, self._pid = threading.Lock(), threading.Lock(), os.getpid()

    @contextlib.contextmanager
    def alone(self) -> Iterator[Mapping[Series, Sent]]:
        """Keep other reports waiting; gives what was sent. Raises `TimeoutError` after a second."""
        if self._pid != os.getpid():  # forked: the thread that held the locks does not exist here
            self._lock, self._changing, self._pid = threading.Lock(), threading.Lock(), os.getpid()
        if not self._lock.acquire(timeout=_WAIT_SECONDS):
            raise TimeoutError("another report to the same receiver is under way")
        try:
            yield self._sent
        finally:
            self._lock.release()

    def sent(self) -> dict[Series, Sent]:
        """Return what was sent, between two moves; from any thread."""
        with self._changing:
            return dict(self._sent)

    def skip(self, changes: Mapping[Series, Sent | None]) -> None:
        """Move without sending; ``None`` forgets a series."""
        with self._changing:
            for series, sent in changes.items():
                if sent is None:
                    self._sent.pop(series, None)
                else:
                    self._sent[series] = sent

    def move(self, changes: Mapping[Series, Sent | None]) -> None:
        """Move because these counts are about to be sent; raises `Unsaved`."""
        before = {series: self._sent.get(series) for series in changes}
        self.skip(changes)  # first: a journal that is being written has the move or is followed by it
        if not self._save(changes):
            self.move_back(before)
            raise Unsaved("the journal can't be written, so counts wait for the next report")

    def move_back(self, changes: Mapping[Series, Sent | None]) -> None:
        """Move back, as these counts could not be sent; if that can't be saved, a successor skips them."""
        self.skip(changes)
        self._save(changes)
