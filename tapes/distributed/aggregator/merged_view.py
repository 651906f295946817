"""What an aggregator's own registry answers: the merged view, and in it what the aggregator tells of itself.

``tapes.workers`` {state}, ``tapes.messages``, ``tapes.rejected``, ``tapes.publish.lag`` (from the making of a
publication to its arrival), ``tapes.journal.failed`` and ``tapes.aggregator.memory``.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable

from tapes import forks
from tapes.clock import monotonic, tick_at
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol.messages import NOBODY, Item, Update
from tapes.distributed.protocol.wire import encode
from tapes.distributed.transport.requests import MAX_WAIT_SECONDS
from tapes.exposition import write
from tapes.metrics import Gauge
from tapes.registry import Registry
from tapes.reporting.base import FAILED, SKIPPED
from tapes.reporting.statsd import SENDS_FAILED
from tapes.session import Session
from tapes.sharing import Shared
from tapes.snapshot import Snapshot

__all__ = ["JOURNAL_FAILED", "LAG", "MESSAGES", "MergedView"]

MESSAGES, LAG, JOURNAL_FAILED = "tapes.messages", "tapes.publish.lag", "tapes.journal.failed"
_WORKERS, _MEMORY = "tapes.workers", "tapes.aggregator.memory"
_OF_ONE_PROCESS = (MESSAGES, LAG)
"""What begins at zero with each aggregator; only it tells them, so a reader sees that they were reset."""


class MergedView(Session):
    """The session of the registry that reporters read: it answers from the ledger."""

    is_connected = is_aggregator = True

    def __init__(self, ledger: Ledger, registry: Registry) -> None:
        super().__init__(registry)
        self._ledger = ledger
        self._seq = 0
        self._lock = threading.Lock()
        self._shared: Shared[bytes] = Shared(MAX_WAIT_SECONDS)
        self._live, self._retired = (registry.own(Gauge, _WORKERS, state=s) for s in ("live", "retired"))
        self._memory = registry.own(Gauge, _MEMORY)
        registry.describe(_WORKERS, "Worker processes that live, and that have left.")
        registry.describe(_MEMORY, "Resident memory of the aggregator.", unit="bytes")
        registry.describe(MESSAGES, "Messages that the aggregator received since it was started.")
        registry.describe("tapes.rejected", "Values and messages that were dropped.")
        registry.describe(LAG, "From the making of a publication to its arrival.")
        registry.describe("tapes.publish.duration", "What a worker spends on a publication.")
        registry.describe(JOURNAL_FAILED, "Times that the journal could not be written.")
        registry.describe(FAILED, "Reports that failed.")
        registry.describe(SKIPPED, "Reports left out as the one before was not done.")
        registry.describe(SENDS_FAILED, "Packets for StatsD that could not be sent.")

    def snapshot(self) -> Snapshot:
        """Return the merged view."""
        self.include_ourselves()
        return self._ledger.snapshot(tick_at(monotonic()))

    def render(self, form: str, write: Callable[[Snapshot, str], bytes] = write) -> bytes:
        """Return the merged view in that form; readers that ask at once share one answer."""
        return self._shared.call(form, lambda: write(self.snapshot(), form))

    def states(self, version: int | None = None) -> bytes:
        """Return the states themselves, for who speaks that version of the wire."""
        self.include_ourselves()
        return encode(self._ledger.merged(tick_at(monotonic())), version)

    def include_ourselves(self) -> None:
        """Enter the aggregator's own metrics into the ledger."""
        with self._lock:
            self._live.set(self._ledger.living - (self._seq > 0))  # it is in the ledger itself
            self._retired.set(self._ledger.retired)
            self._memory.set(_resident_bytes())
            self._seq += 1
            items = [Item(*series) for series in self.registry.collect()]
            described = self.registry.descriptions() if self._seq == 1 else {}
            self._ledger.apply(Update(NOBODY, forks.this_process(), "", self._seq, 0, items, described))

    def for_the_journal(self) -> list[Item]:
        """Return what the aggregator has counted itself and the next one goes on with."""
        every = [Item(*series) for series in self.registry.collect()]
        return [item for item in every if item.kind != "gauge" and item.name not in _OF_ONE_PROCESS]


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
