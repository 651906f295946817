"""The merged view: what an aggregator's own registry answers. It includes the aggregator's own metrics.

These are ``tapes.workers`` {state}, ``tapes.messages``, ``tapes.rejected``, ``tapes.publish.lag`` (from the
making of a publication to its arrival), ``tapes.journal.failed`` and ``tapes.aggregator.memory``.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable

from tapes.clock import monotonic, tick_at
from tapes.distributed.aggregator.cursors import Cursors
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol.messages import Item
from tapes.distributed.protocol.wire import encode
from tapes.distributed.transport.requests import MAX_WAIT_SECONDS
from tapes.exposition import write
from tapes.metrics import Gauge
from tapes.registry import Registry
from tapes.reporting.base import FAILED, SKIPPED
from tapes.reporting.cursor import Cursor
from tapes.reporting.statsd import SENDS_FAILED
from tapes.session import Session
from tapes.sharing import Shared
from tapes.snapshot import Snapshot

MESSAGES, LAG, JOURNAL_FAILED = "tapes.messages", "tapes.publish.lag", "tapes.journal.failed"
_WORKERS, _MEMORY = "tapes.workers", "tapes.aggregator.memory"
OF_ONE_PROCESS = (MESSAGES, LAG)
"""Metrics that begin at zero in each aggregator; the journal leaves them out."""


class MergedView(Session):
    """The session of the registry that reporters read; it answers from the ledger."""

    is_connected = is_aggregator = True

    def __init__(self, ledger: Ledger, registry: Registry, cursors: Cursors) -> None:
        super().__init__(registry)
        self._ledger = ledger
        self._cursors = cursors
        self._lock = threading.Lock()
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

    def cursor(self, target: str) -> Cursor:
        return self._cursors.of(target)

    def for_the_journal(self) -> list[Item]:
        """Return the aggregator's own counts that its successor continues."""
        return [
            item for item in self._collected() if item.kind != "gauge" and item.name not in OF_ONE_PROCESS
        ]

    def _own(self) -> list[Item]:
        with self._lock:
            self._live.set(self._ledger.living)
            self._retired.set(self._ledger.retired)
            self._memory.set(_resident_bytes())
            return self._collected()

    def _collected(self) -> list[Item]:
        return [Item(*series) for series in self.registry.collect()]


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
