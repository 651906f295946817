"""The parts of a ledger: an account for each worker, an entry for each series, and all names and slots."""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable, Iterator
from enum import Enum, IntEnum
from typing import Any, NamedTuple

from tapes.catalogue import MAX_SERIES, OVERFLOW, warn_of_overflow
from tapes.distributed.protocol import messages
from tapes.distributed.protocol.messages import Item
from tapes.metrics import KINDS, GaugeState, State
from tapes.metrics.origin import with_baseline
from tapes.naming import Labels
from tapes.once import OnceLogger
from tapes.processes import Process
from tapes.sums import Number

_log = logging.getLogger("tapes.registry")

Group = tuple[str, list[Labels], list[State]]
"""The series of a name: their kind, their labels and their states."""
Key = tuple[str, Labels]
Rank = tuple[int, int]

BEFORE_ALL: Rank = (-1, -1)  # the rank of no worker: every worker is newer


class Source(IntEnum):
    """Where an update comes from; the baselines of a better source replace those of a worse one."""

    READ = 0
    RELAYED = 1  # in the update of a descendant
    DIRECT = 2  # the worker published it, or exited with it
    JOURNAL = 3


class Worker(NamedTuple):
    """A worker that has not exited."""

    identity: bytes
    process: Process
    host: str
    is_ancestor: bool  # it is known only from the updates of its descendants
    program: int = 0  # as in an `Update`


class Account:
    """Everything known of one worker.

    Attributes:
        rank: Greater than the rank of workers that started earlier.
        known: Every update up to this one is known.
        keyframe: The number of the last keyframe.
        seqs: By series, the number of the update that brought it.
        slots: By series, the key of its entry.
        refused: The names that it uses in another way than newer workers do.
    """

    __slots__ = (
        "ancestors",
        "dead",
        "keyframe",
        "known",
        "rank",
        "refused",
        "seqs",
        "slots",
        "source",
        "worker",
    )

    def __init__(self, worker: Worker, number: int) -> None:
        self.worker = worker
        self.rank = (worker.process.started, number)
        self.known = self.keyframe = 0
        self.source = Source.READ
        self.dead = False
        self.seqs: dict[Key, int] = {}
        self.slots: dict[Key, Key] = {}
        self.ancestors: frozenset[bytes] = frozenset()
        self.refused: set[str] = set()


class Entry:
    """One series: its state by worker, the total of exited workers, and both merged, until one changes.

    States are kept by worker and by the labels that it gave: the overflow series has several of one worker.

    Attributes:
        mode, mode_rank: How a gauge merges, and the rank of the newest worker that has it.
        retired: The total of exited workers; for a gauge that merges as ``last``, the newest value that one
            of them set. Other gauges have none.
    """

    __slots__ = ("by_worker", "kind", "merged", "mode", "mode_rank", "retired")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.mode, self.mode_rank = "", BEFORE_ALL
        self.by_worker: dict[tuple[bytes, Labels], State] = {}
        self.retired: State | None = None
        self.merged: State | None = None

    def total(self) -> State:
        if self.merged is None:
            retired = () if self.retired is None else (self.retired,)
            self.merged = KINDS[self.kind].merge((*retired, *self.by_worker.values()))
        return self.merged

    def retire(self, state: State) -> None:
        """Add ``state`` to the total of exited workers; a gauge's only if its value was set."""
        if isinstance(state, GaugeState) and (state.value is None or state.since is None):
            return
        before = () if self.retired is None else (self.retired,)
        self.retired = KINDS[self.kind].merge((*before, state))
        self.merged = None

    def agreed(self, state: State, rank: Rank) -> State:
        """Return a gauge's state in the mode of the newest worker; older states take that mode, too."""
        assert isinstance(state, GaugeState)
        if rank < self.mode_rank:
            return state if state.mode == self.mode else state._replace(mode=self.mode)
        self.mode_rank = rank
        if state.mode == self.mode:
            return state
        self.mode = state.mode
        self.retired = None  # it merged as ``last`` before, if at all
        for key, known in self.by_worker.items():
            assert isinstance(known, GaugeState)
            self.by_worker[key] = known._replace(mode=state.mode)
        return state

    def correct_baseline(self, key: tuple[bytes, Labels], given: Any) -> None:
        self.by_worker[key] = with_baseline(self.by_worker[key], given.origin.baseline)
        self.merged = None

    def of_each_worker(
        self, labels: Labels, workers: dict[bytes, str]
    ) -> Iterator[tuple[Labels, GaugeState]]:
        """Yield the gauge of each of ``workers``, with its name among the labels."""
        states: dict[str, list[Any]] = {}
        for (identity, _), state in self.by_worker.items():
            if identity in workers:
                states.setdefault(workers[identity], []).append(state)
        for worker, own in states.items():
            its_labels = tuple(sorted({**dict(labels), "worker": worker}.items()))
            yield its_labels, own[0] if len(own) == 1 else GaugeState.add(own)


class Agreement(Enum):
    """How a worker's kind of a metric relates to that of other workers."""

    SAME = "the same kind"
    NEWER = "another kind, of a newer worker"
    OLDER = "another kind, of an older worker"


class Names:
    """What a ledger knows of each name: the kind of the metric, whether its gauges stay, its description.

    Workers may differ in these, as in a rolling deploy. The most recently started worker wins.
    """

    def __init__(self) -> None:
        self.descriptions: messages.Descriptions = {}
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
        """Enter how a worker merges a gauge; its entry had the mode ``before`` and has ``now``."""
        if item.state.mode == "last":  # type: ignore[attr-defined]
            self._lasts[item.name] = max(self._lasts.get(item.name, BEFORE_ALL), rank)
        if before == "last" != now:
            self._maybe_former.add(item.name)

    def describe(self, descriptions: messages.Descriptions, rank: Rank) -> None:
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


class SeriesSlots:
    """The slots of a ledger's series, and the entries in them; a name has at most ``max_series`` slots.

    Further series share one slot, the one labelled ``overflow="true"``.

    A restarted aggregator must give each series the slot that it had, as its reporters' cursors count by
    slot. So series with a cursor have a reserved slot; and if the overflow series has one, the name has no
    other free slot.

    Attributes:
        entries: By slot.
        sizes: Number of slots of each name, without the overflow slot.
    """

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.sizes: collections.Counter[str] = collections.Counter()
        self.max_series = MAX_SERIES
        self._once = OnceLogger(_log)
        self._reserved: set[Key] = set()
        self._full: set[str] = set()

    def reserve(self, keys: Iterable[Key]) -> None:
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
        """Return the merged series of every name, with the ``own`` ones of the aggregator.

        Where a worker gives a name of the latter another kind, they replace its series. ``workers`` has the
        names of the workers that publish.
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


def baseline_of(account: Account, before: Any, item: Item, source: Source) -> Number | None:
    """Return the baseline of a count in the ledger; ``None`` to keep the one in ``item``.

    A worker resets its baselines when its publisher finds an aggregator, which may be the same one after a
    broken connection, or another one. So its first publication decides, and later ones don't. A read may come
    before: then all is baseline until the publication. Baselines of the worker itself replace those that its
    descendants gave.
    """
    state: Any = item.state
    if item.kind == "gauge" or source > account.source:
        return None
    if account.source is Source.READ:
        return state.counted  # type: ignore[no-any-return]
    if before is not None:
        return before.origin.baseline  # type: ignore[no-any-return]
    return 0 if account.source is Source.DIRECT else None


def worker_names(accounts: Iterable[Account]) -> dict[bytes, str]:
    """Return names for the workers that publish: the pid, with part of the identity if two share a pid."""
    publishing = {a.worker.identity: a.worker.process.pid for a in accounts if not a.worker.is_ancestor}
    pids = collections.Counter(publishing.values())
    return {i: str(pid) if pids[pid] == 1 else f"{pid}-{i.hex()[:8]}" for i, pid in publishing.items()}
