"""The series of a ledger, each in its place; a name has at most ``max_series`` of them.

What comes after them shares one place, the one that is labelled ``overflow="true"``.
"""

from __future__ import annotations

from collections import Counter

from tapes.catalogue import MAX_SERIES, OVERFLOW, warn_of_overflow
from tapes.distributed.aggregator.entries import Entry, Key
from tapes.metrics import GaugeState, State
from tapes.naming import Labels

__all__ = ["Group", "Places"]

Group = tuple[list[Labels], list[State]]
"""The labels of a name's series, and their states."""


class Places:
    """Places of series, and what is kept there.

    Attributes:
        entries: Every place that is taken, and its series.
        sizes: How many places each name has, not counting the one that is shared.
        max_series: Maximum number of places of a name.
    """

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.sizes: Counter[str] = Counter()
        self.max_series = MAX_SERIES
        self._overflowing: set[str] = set()

    def take(self, key: Key, kind: str) -> Key:
        """Return where a series is kept: in its own place, or with all that have none."""
        name, labels = key
        if key not in self.entries:
            if self.sizes[name] < self.max_series or OVERFLOW in labels:
                self.sizes[name] += OVERFLOW not in labels
            else:
                if name not in self._overflowing:
                    self._overflowing.add(name)
                    warn_of_overflow(name, self.max_series)
                key = (name, (OVERFLOW,))
            self.entries.setdefault(key, Entry(kind))
        return key

    def free(self, place: Key) -> None:
        """Forget a place if nothing is kept there any more."""
        entry = self.entries[place]
        if not entry.by_worker and entry.retired is None:
            del self.entries[place]
            self.sizes[place[0]] -= OVERFLOW not in place[1]

    def forget(self, name: str) -> None:
        """Forget all places of a name."""
        for place in [place for place in self.entries if place[0] == name]:
            del self.entries[place]
        del self.sizes[name]

    def merged(self, workers: dict[bytes, str]) -> dict[str, Group]:
        """Return every name's series, merged; ``workers`` are the names of those that publish."""
        groups: dict[str, Group] = {}
        for (name, labels), entry in self.entries.items():
            every_labels, states = groups.setdefault(name, ([], []))
            merged = entry.whole()
            if isinstance(merged, GaugeState) and merged.mode == "each":
                for its_labels, state in entry.of_each_worker(labels, workers):
                    every_labels.append(its_labels)
                    states.append(state)
            else:
                every_labels.append(labels)
                states.append(merged)
        return {name: group for name, group in groups.items() if group[1]}
