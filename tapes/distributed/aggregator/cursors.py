"""The cursors of an aggregator's reporters, which its journal keeps for its successor.

Theory. A cursor moves before its packet goes out, and the move is in the journal by then. So whenever the
aggregator is killed, its successor sends no count twice; it loses one packet at most. All other counts that
were not yet sent are sent by the successor.

The successor begins with what the journal has, which may be a second old. The newest counts are missing until
each live worker has sent its states again; until then a count that is behind its cursor is not taken for one
that was removed. A receiver that is not in the journal gets no history: what it was sent is unknown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol.messages import Cursor as CursorRecord
from tapes.distributed.protocol.messages import Message, SentCount
from tapes.reporting.cursor import Cursor, Sent, Series, Unsaved
from tapes.sums import Number

_PIECE = 1000
"""Maximum number of series in a record of a journal."""

Positions = dict[str, dict[Series, tuple[Number, Number, Number]]]
"""By receiver and series, what was sent."""


class Cursors:
    """The cursors of all receivers.

    Args:
        ledger: What the reporters report.
        append: Appends a message to the journal; returns whether that was possible.
    """

    def __init__(self, ledger: Ledger, append: Callable[[Message], bool]) -> None:
        self._ledger = ledger
        self._append = append
        self._lock = threading.Lock()
        self._cursors: dict[str, _JournaledCursor] = {}
        self._skips_history = False

    def restore(self, positions: Positions) -> None:
        self._skips_history = True
        for target, counts in positions.items():
            cursor = self._cursors[target] = _JournaledCursor(target, self._ledger, self._append)
            cursor.skip({series: Sent(*sent) for series, sent in counts.items()})
            self._ledger.slots.reserve(counts)

    def of(self, target: str) -> Cursor:
        with self._lock:
            cursor = self._cursors.get(target)
            if cursor is None:
                cursor = self._cursors[target] = _JournaledCursor(target, self._ledger, self._append)
                cursor.skips_history = self._skips_history
                if not self._skips_history:
                    self._append(CursorRecord(target, ()))  # the successor knows that nothing was sent
            return cursor

    def records(self) -> Iterator[CursorRecord]:
        with self._lock:
            every = list(self._cursors.values())
        for cursor in every:
            yield from cursor.records()


class _JournaledCursor(Cursor):
    """A cursor that is saved before it moves."""

    def __init__(self, target: str, ledger: Ledger, append: Callable[[Message], bool]) -> None:
        super().__init__()
        self._target = target
        self._ledger = ledger
        self._append = append
        self._changing = threading.Lock()

    @property
    def may_lag(self) -> bool:  # type: ignore[override]
        return bool(self._ledger.unconfirmed)

    def skip(self, changes: Mapping[Series, Sent | None]) -> None:
        with self._changing:
            super().skip(changes)

    def move(self, changes: Mapping[Series, Sent | None]) -> None:
        """Move, and append the move to the journal; raises `Unsaved` if that fails."""
        before = {series: self._sent.get(series) for series in changes}
        self.skip(changes)  # first: a journal that is being written has the move or is followed by it
        if not self._save(changes):
            self.move_back(before)
            raise Unsaved("the journal can't be written, so counts wait for the next report")

    def move_back(self, changes: Mapping[Series, Sent | None]) -> None:
        """Move back; if that can't be saved, a successor does not send these counts."""
        self.skip(changes)
        self._save(changes)

    def _save(self, changes: Mapping[Series, Sent | None]) -> bool:
        pieces = _pieces(changes.items())
        return all(self._append(CursorRecord(self._target, piece)) for piece in pieces)

    def records(self) -> Iterator[CursorRecord]:
        if self.skips_history:  # nothing is known yet
            return
        with self._changing:
            every = list(self._sent.items())
        yield CursorRecord(self._target, ())
        for piece in _pieces(every):
            yield CursorRecord(self._target, piece)


def _pieces(counts: Iterable[tuple[Series, Sent | None]]) -> Iterator[tuple[SentCount, ...]]:
    rows = [SentCount(*series, None if sent is None else sent[:3]) for series, sent in counts]
    for start in range(0, len(rows), _PIECE):
        yield tuple(rows[start : start + _PIECE])
