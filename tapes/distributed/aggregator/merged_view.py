"""The merged view: what an aggregator's own registry answers, and what its reporters have sent of that.

It includes the aggregator's own metrics: ``tapes.workers`` {state}, ``tapes.messages``, ``tapes.rejected``,
``tapes.publish.lag``, ``tapes.journal.failed`` and ``tapes.aggregator.memory``.

Theory of the cursors (`tapes.reporting.cursor`), which the journal keeps for the successor. A cursor moves
before its packet goes out, and the move is in the journal by then. So whenever the aggregator is killed, its
successor sends no count twice; it loses one packet at most. All other counts that were not yet sent are sent
by the successor.

The successor begins with what the journal has, which may be a second old. The newest counts are missing until
each live worker has sent its states again; until then a count that is behind its cursor is not taken for one
that was removed. A receiver that is not in the journal gets no history: what it was sent is unknown.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

from tapes.clock import monotonic, tick_at
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol import messages
from tapes.distributed.protocol.messages import Item, Message
from tapes.distributed.protocol.wire import encode
from tapes.distributed.transport.requests import MAX_WAIT_SECONDS
from tapes.exposition import write
from tapes.metrics import Gauge
from tapes.registry import Registry
from tapes.reporting.base import FAILED, SKIPPED
from tapes.reporting.cursor import Cursor, Sent, Series
from tapes.reporting.statsd import SENDS_FAILED
from tapes.session import Session
from tapes.sharing import Shared
from tapes.snapshot import Snapshot
from tapes.sums import Number

MESSAGES, LAG, JOURNAL_FAILED = "tapes.messages", "tapes.publish.lag", "tapes.journal.failed"
_WORKERS, _MEMORY = "tapes.workers", "tapes.aggregator.memory"
_OF_ONE_PROCESS = (MESSAGES, LAG)
"""Metrics that begin at zero in each aggregator; the journal leaves them out."""
_PIECE = 1000  # maximum number of series in a record of a journal


class MergedView(Session):
    """The session of the registry that reporters read; ``append`` appends to the journal, if possible."""

    is_connected = is_aggregator = True

    def __init__(self, ledger: Ledger, registry: Registry, append: Callable[[Message], bool]) -> None:
        super().__init__(registry)
        self._ledger = ledger
        self._append = append
        self._lock, self._cursors_lock = threading.Lock(), threading.Lock()
        self._cursors: dict[str, Cursor] = {}
        self._skips_history = False
        self._shared: Shared[bytes] = Shared(MAX_WAIT_SECONDS)
        self._live, self._retired = (registry.own(Gauge, _WORKERS, state=s) for s in ("live", "retired"))
        self._memory = registry.own(Gauge, _MEMORY)
        registry.describe(_WORKERS, "Worker processes: live ones, and retired ones, which have exited.")
        registry.describe(_MEMORY, "Resident memory of the aggregator.", unit="bytes")
        registry.describe(MESSAGES, "Messages that the aggregator has received since its start.")
        registry.describe("tapes.rejected", "Values and messages that were dropped.")
        registry.describe(LAG, "Time from the making of a publication to its arrival.")
        registry.describe("tapes.publish.duration", "Time that a worker takes for a publication.")
        registry.describe(JOURNAL_FAILED, "Times that the journal could not be written.")
        registry.describe(FAILED, "Reports that failed.")
        registry.describe(SKIPPED, "Reports skipped because the one before was still running.")
        registry.describe(SENDS_FAILED, "Packets for StatsD that could not be sent.")

    def snapshot(self) -> Snapshot:
        return self._ledger.snapshot(tick_at(monotonic()), self._own(), self.registry.descriptions())

    def render(self, form: str, write: Callable[[Snapshot, str], bytes] = write) -> bytes:
        """Return the merged view in that form; readers that ask at once share one answer."""
        return self._shared.call(form, lambda: write(self.snapshot(), form))

    def states(self) -> bytes:
        return encode(self._ledger.merged(tick_at(monotonic()), self._own(), self.registry.descriptions()))

    def for_the_journal(self) -> list[Item]:
        """Return the aggregator's own counts that its successor continues."""
        return [i for i in self._collected() if i.kind != "gauge" and i.name not in _OF_ONE_PROCESS]

    def _own(self) -> list[Item]:
        with self._lock:
            self._live.set(self._ledger.living)
            self._retired.set(self._ledger.retired)
            self._memory.set(_resident_bytes())
            return self._collected()

    def _collected(self) -> list[Item]:
        return [Item(*series) for series in self.registry.collect()]

    def cursor(self, target: str) -> Cursor:
        with self._cursors_lock:
            cursor = self._cursors.get(target)
            if cursor is None:
                cursor = self._new_cursor(target)
                cursor.skips_history = self._skips_history
                if not self._skips_history:
                    self._append(messages.Cursor(target, ()))  # the successor knows that nothing was sent
            return cursor

    def restore_cursors(self, sent: Mapping[str, Mapping[Series, tuple[Number, Number, Number]]]) -> None:
        """Continue with what each receiver was sent."""
        self._skips_history = True
        for target, counts in sent.items():
            kept = {
                series: Sent(*count) for series, count in counts.items() if series[0] not in _OF_ONE_PROCESS
            }
            self._new_cursor(target).skip(kept)
            self._ledger.slots.reserve(kept)

    def cursor_records(self) -> Iterator[messages.Cursor]:
        with self._cursors_lock:
            every = list(self._cursors.items())
        for target, cursor in every:
            if not cursor.skips_history:  # else nothing is known yet
                yield messages.Cursor(target, ())
                yield from _records(target, cursor.sent())

    def _new_cursor(self, target: str) -> Cursor:
        def save(changes: Mapping[Series, Sent | None]) -> bool:
            return all(map(self._append, _records(target, changes)))

        cursor = self._cursors[target] = Cursor(lambda: bool(self._ledger.unconfirmed), save)
        return cursor


def _records(target: str, counts: Mapping[Series, Sent | None]) -> Iterator[messages.Cursor]:
    rows = [
        messages.SentCount(*series, None if sent is None else sent[:3]) for series, sent in counts.items()
    ]
    for start in range(0, len(rows), _PIECE):
        yield messages.Cursor(target, tuple(rows[start : start + _PIECE]))


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
