"""The slots of a ledger's series; a name has at most ``max_series`` of them.

Further series share one slot, the one labelled ``overflow="true"``.

A restarted aggregator must give each series the slot that it had, as its reporters' cursors count by slot. So
series with a cursor have a reserved slot; and if the overflow series has one, the name has no other free
slot.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable

from tapes.catalogue import MAX_SERIES, OVERFLOW, warn_of_overflow
from tapes.distributed.aggregator.entries import Entry, Key
from tapes.distributed.protocol.messages import Item
from tapes.metrics import KINDS, GaugeState, State
from tapes.naming import Labels
from tapes.once import OnceLogger

_log = logging.getLogger("tapes.registry")

Group = tuple[str, list[Labels], list[State]]
"""The series of a name: their kind, their labels and their states."""


class SeriesSlots:
    """The slots of series, and the entries in them.

    Attributes:
        entries: By slot.
        sizes: Number of slots of each name, without the overflow slot.
        max_series: Maximum number of slots of a name.
    """

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.sizes: collections.Counter[str] = collections.Counter()
        self.max_series = MAX_SERIES
        self._once = OnceLogger(_log)
        self._reserved: set[Key] = set()
        self._full: set[str] = set()

    def reserve(self, keys: Iterable[Key]) -> None:
        """Reserve the slots that series had in an earlier aggregator."""
        self._reserved.update(keys)
        self._full.update(name for name, labels in self._reserved if OVERFLOW in labels)

    def take(self, key: Key, kind: str) -> Key:
        """Return the slot of a series: its own, or the overflow slot."""
        name, labels = key
        if key not in self.entries:
            has_room = self.sizes[name] < self.max_series and name not in self._full
            if has_room or OVERFLOW in labels or key in self._reserved:
                self.sizes[name] += OVERFLOW not in labels
            else:
                warn_of_overflow(self._once, name, self.max_series)
                key = (name, (OVERFLOW,))
            self.entries.setdefault(key, Entry(kind))
        return key

    def free(self, slot: Key) -> None:
        entry = self.entries[slot]
        if not entry.by_worker and entry.retired is None:
            del self.entries[slot]
            self.sizes[slot[0]] -= OVERFLOW not in slot[1]

    def forget(self, name: str) -> None:
        for slot in [slot for slot in self.entries if slot[0] == name]:
            del self.entries[slot]
        del self.sizes[name]

    def merged(self, workers: dict[bytes, str], own: Iterable[Item]) -> dict[str, Group]:
        """Return the merged series of every name.

        Args:
            workers: The names of the workers that publish.
            own: Series of the aggregator itself; where a worker gives one of their names another kind, they
                replace it.
        """
        groups: dict[str, Group] = {}
        for (name, labels), entry in self.entries.items():
            _, every_labels, states = groups.setdefault(name, (entry.kind, [], []))
            merged = entry.total()
            if isinstance(merged, GaugeState) and merged.mode == "each":
                for its_labels, its_state in entry.of_each_worker(labels, workers):
                    every_labels.append(its_labels)
                    states.append(its_state)
            else:
                every_labels.append(labels)
                states.append(merged)
        for kind, name, labels, state in own:
            if name not in groups or groups[name][0] != kind:
                groups[name] = (kind, [], [])
            _, every_labels, states = groups[name]
            if labels in every_labels:
                place = every_labels.index(labels)
                states[place] = KINDS[kind].merge((states[place], state))
            else:
                every_labels.append(labels)
                states.append(state)
        return {name: group for name, group in groups.items() if group[1]}
