"""What a ledger knows of each name: the kind of the metric, whether its gauges stay, its description.

Workers may differ in these, as in a rolling deploy. The most recently started worker wins.
"""

from __future__ import annotations

from enum import Enum

from tapes.distributed.aggregator.entries import BEFORE_ALL, Entry, Rank
from tapes.distributed.protocol.messages import Descriptions, Item


class Agreement(Enum):
    """How a worker's kind of a metric relates to that of other workers."""

    SAME = "the same kind"
    NEWER = "another kind, of a newer worker"
    OLDER = "another kind, of an older worker"


class Names:
    """The names of a ledger's metrics.

    Attributes:
        descriptions: By name.
    """

    def __init__(self) -> None:
        self.descriptions: Descriptions = {}
        self._described_by: dict[str, Rank] = {}
        self._kinds: dict[str, str] = {}
        self._ranks: dict[str, Rank] = {}  # by name, of the newest worker that has it
        self._lasts: dict[str, Rank] = {}  # by name, of the newest worker that merges it as "last"
        self._maybe_former: set[str] = set()  # names that may no longer merge as "last"

    def kind_of(self, name: str) -> str | None:
        return self._kinds.get(name)

    def enter(self, name: str, kind: str, rank: Rank) -> Agreement:
        """Enter the kind of a metric, unless a newer worker has another one."""
        agreement = Agreement.SAME
        if self._kinds.setdefault(name, kind) != kind:
            if rank < self._ranks[name]:
                return Agreement.OLDER
            agreement = Agreement.NEWER
            self._kinds[name] = kind
            self._lasts.pop(name, None)
        if self._ranks.setdefault(name, rank) < rank:
            self._ranks[name] = rank
            self._maybe_former.add(name)
        return agreement

    def enter_mode(self, item: Item, rank: Rank, before: str, now: str) -> None:
        """Enter how a worker merges a gauge whose entry had the mode ``before`` and has ``now``."""
        if item.state.mode == "last":  # type: ignore[attr-defined]
            self._lasts[item.name] = max(self._lasts.get(item.name, BEFORE_ALL), rank)
        if before == "last" != now:
            self._maybe_former.add(item.name)

    def describe(self, descriptions: Descriptions, rank: Rank) -> None:
        for name, description in descriptions.items():
            if rank >= self._described_by.get(name, rank):
                self._described_by[name] = rank
                self.descriptions[name] = description

    def outlives(self, name: str, entry: Entry) -> bool:
        """Return whether a series stays when its worker has exited: a count, or a last value.

        It is a last value if the newest worker that has it merges it as ``last``, and the newest worker that
        has its name still merges some series of that name so.
        """
        if entry.kind != "gauge":
            return True
        return entry.mode == "last" and self._lasts.get(name, BEFORE_ALL) >= self._ranks[name]

    def maybe_former_lasts(self) -> set[str]:
        """Return the names that may have stopped merging as ``last`` since the last call."""
        names, self._maybe_former = self._maybe_former & self._lasts.keys(), set()
        return names
