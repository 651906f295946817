"""The ledger: the newest state of every live worker, and one total of all that have left.

Theory. States are cumulative, so applying an update is replacement: per series, the state of the highest
sequence number stands, and messages may be lost, repeated or overtaken. A worker that leaves is added to
the retired total once and its identity remembered, so that late words of it change nothing. Gauges leave
with their worker. Merging is done per series when somebody reads, and kept until an update touches it:
memory and the cost of a read depend on live workers and series, not on how many workers have lived.

What a worker says of its ancestors is entered as if they had said it themselves: they are accounts like any
other, only silent ones. A name has at most as many label sets as its most generous worker allows; what comes
after them is added up in one series labelled ``overflow="true"``, apart for each worker that still lives.

The ledger does no I/O and knows no clock. One lock makes it safe to read from reporters' threads.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from tapes.catalogue import MAX_SERIES, OVERFLOW, warn_of_overflow
from tapes.distributed.messages import Descriptions, Item, Merged, Update
from tapes.forks import Process
from tapes.metrics import KINDS, GaugeState, State
from tapes.metrics.origin import with_told
from tapes.naming import Labels
from tapes.snapshot import Family, Snapshot
from tapes.sums import Number
from tapes.threads import RLock

__all__ = ["Ledger", "Worker"]

_REMEMBERED = 100_000
"""So many identities of workers that have left are kept; late words come within seconds."""

_ASKED, _OF_IT, _ITSELF = range(3)
"""How a worker was heard: it asked, descendants published what they know of it, or it did itself."""

_Key = tuple[str, Labels]
_Group = tuple[list[Labels], list[State]]


class Worker(NamedTuple):
    """Who a live worker is; a silent one is known only by what its descendants say of it."""

    identity: bytes
    process: Process
    host: str
    silent: bool


class _Account:
    """What is known of one worker: everything up to its update ``known``, and which one brought a series."""

    __slots__ = ("ancestors", "dead", "heard", "known", "places", "seqs", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.known = 0
        self.heard = _ASKED
        self.dead = False
        self.seqs: dict[_Key, int] = {}
        self.places: dict[_Key, _Key] = {}
        self.ancestors: frozenset[bytes] = frozenset()


class _Entry:
    """One series: its state by worker, the total of those that left, and both merged, if nothing changed.

    States are kept by worker and the labels that it gave: an overflowing series has several of one worker.
    """

    __slots__ = ("by_worker", "kind", "merged", "retired")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.by_worker: dict[tuple[bytes, Labels], State] = {}
        self.retired: State | None = None
        self.merged: State | None = None


class Ledger:
    """Adds up the states of workers; safe from any thread."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._accounts: dict[bytes, _Account] = {}
        self._entries: dict[_Key, _Entry] = {}
        self._kinds: dict[str, str] = {}
        self._sizes: Counter[str] = Counter()
        self._overflowing: set[str] = set()
        self._max_series = MAX_SERIES
        self._descriptions: Descriptions = {}
        self._left: OrderedDict[bytes, None] = OrderedDict()
        self._memory: dict[str, Any] = {}
        self.retired = 0

    @property
    def workers(self) -> list[Worker]:
        """The workers that have not left."""
        with self._lock:
            return [account.worker for account in self._accounts.values()]

    @property
    def living(self) -> int:
        """How many workers live, as far as is known, and speak for themselves."""
        with self._lock:
            return sum(not a.dead and not a.worker.silent for a in self._accounts.values())

    def ancestors(self) -> set[bytes]:
        """Return the identities that living workers speak of as their ancestors."""
        with self._lock:
            living = (account.ancestors for account in self._accounts.values() if not account.dead)
            return set().union(*living)

    def apply(self, update: Update, *, published: bool = True) -> tuple[bool, list[str]]:
        """Take in a worker's update.

        Args:
            update: What it says.
            published: Whether it published that or left with it; ``False`` if it came with a question.

        Returns:
            Whether everything up to this update is known now, and the names that were refused because
            they belong to another kind of metric.
        """
        with self._lock:
            refused: list[str] = []
            for ancestor in update.ancestors:
                refused += self._apply(ancestor, silent=True, published=published)[1]
            complete, own = self._apply(update, silent=False, published=published)
            return complete, refused + own

    def bury(self, identity: bytes) -> None:
        """Let the gauges of a worker that died leave; its counts can still be replaced by last words."""
        with self._lock:
            account = self._accounts.get(identity)
            if account is not None and not account.dead:
                account.dead = True
                for key, place in list(account.places.items()):
                    if self._entries[place].kind == "gauge":
                        self._drop(account, key)

    def retire(self, identity: bytes) -> None:
        """Add what a worker counted to the retired total; nothing if it is not known, or left already."""
        with self._lock:
            account = self._accounts.pop(identity, None)
            if account is None:
                return
            self.retired += not account.worker.silent
            self._left[identity] = None
            if len(self._left) > _REMEMBERED:
                self._left.popitem(last=False)
            for key in list(account.places):
                entry = self._entries[account.places[key]]
                if entry.kind != "gauge":
                    state = entry.by_worker[identity, key[1]]
                    before = () if entry.retired is None else (entry.retired,)
                    entry.retired = KINDS[entry.kind].merge((*before, state))
                self._drop(account, key)

    def merged(self, tick: int) -> Merged:
        """Return the states of the whole service."""
        with self._lock:
            items = [
                Item(self._kinds[name], name, labels, state)
                for name, group in self._merged_groups().items()
                for labels, state in zip(*group)
            ]
            return Merged(tick, items, dict(self._descriptions))

    def snapshot(self, tick: int) -> Snapshot:
        """Return what a reader sees of the whole service as of ``tick``."""
        with self._lock:
            families = [
                Family(name, self._kinds[name], self._descriptions.get(name), *group, tick)
                for name, group in self._merged_groups().items()
            ]
        return Snapshot(families, self._memory)

    def _merged_groups(self) -> dict[str, _Group]:
        """Return the labels and the merged states of every name's series."""
        names = self._worker_names()
        groups: dict[str, _Group] = {}
        for (name, labels), entry in self._entries.items():
            if name not in groups:
                groups[name] = ([], [])
            every_labels, states = groups[name]
            merged = entry.merged
            if merged is None:
                retired = () if entry.retired is None else (entry.retired,)
                merged = entry.merged = KINDS[entry.kind].merge((*retired, *entry.by_worker.values()))
            if isinstance(merged, GaugeState) and merged.mode == "each":
                for its_labels, state in _of_each_worker(labels, entry, names):
                    every_labels.append(its_labels)
                    states.append(state)
            else:
                every_labels.append(labels)
                states.append(merged)
        return {name: group for name, group in groups.items() if group[1]}

    def _apply(self, update: Update, *, silent: bool, published: bool) -> tuple[bool, list[str]]:
        if update.identity in self._left:
            return True, []
        account = self._accounts.get(update.identity)
        if account is None or (account.worker.silent and not silent):
            worker = Worker(update.identity, update.process, update.host, silent)
            account = account or self._accounts.setdefault(update.identity, _Account(worker))
            account.worker = worker
        if silent:
            account.dead = False  # a living child speaks of it
        else:
            account.ancestors |= {ancestor.identity for ancestor in update.ancestors}
            self._max_series = max(self._max_series, update.max_series)
        says = _ITSELF if published and not silent else _OF_IT if published else _ASKED
        refused = [item.name for item in update.items if not self._put(account, update.seq, item, says)]
        account.heard = max(account.heard, says)
        self._descriptions.update(update.descriptions)
        if update.base == 0 and not silent:
            self._drop_removed(account, update)
        complete = update.base <= account.known
        if complete:
            account.known = max(account.known, update.seq)
        return complete, refused

    def _put(self, account: _Account, seq: int, item: Item, says: int) -> bool:
        """Take in one series of a worker; return whether its kind agrees with what is known."""
        key = (item.name, item.labels)
        if account.seqs.get(key, 0) >= seq or (account.dead and item.kind == "gauge"):
            if says > account.heard:  # a question has overtaken it
                self._note_told(account, key, item)
            return True
        if self._kinds.setdefault(item.name, item.kind) != item.kind:
            return False
        place = account.places.get(key)
        if place is None:
            place = account.places[key] = self._place(key, item.kind)
        entry = self._entries[place]
        whose = (account.worker.identity, item.labels)
        told = _told_before(account, entry.by_worker.get(whose), item, says)
        entry.by_worker[whose] = item.state if told is None else with_told(item.state, told)
        entry.merged = None
        account.seqs[key] = seq
        return True

    def _note_told(self, account: _Account, key: _Key, item: Item) -> None:
        """Take from ``item`` what aggregators before this one were told."""
        entry = self._entries[account.places[key]] if key in account.places else None
        if entry is not None and entry.kind == item.kind != "gauge":
            whose = (account.worker.identity, item.labels)
            given: Any = item.state
            entry.by_worker[whose] = with_told(entry.by_worker[whose], given.origin.told)
            entry.merged = None

    def _place(self, key: _Key, kind: str) -> _Key:
        """Return where a series is kept: in its own place, or with all that have none."""
        name, labels = key
        if key not in self._entries:
            if self._sizes[name] < self._max_series or OVERFLOW in labels:
                self._sizes[name] += OVERFLOW not in labels
            else:
                if name not in self._overflowing:
                    self._overflowing.add(name)
                    warn_of_overflow(name, self._max_series)
                key = (name, (OVERFLOW,))
            self._entries.setdefault(key, _Entry(kind))
        return key

    def _drop_removed(self, account: _Account, keyframe: Update) -> None:
        """Forget the series that a worker's keyframe no longer has."""
        kept = {(item.name, item.labels) for item in keyframe.items}
        for key, seq in list(account.seqs.items()):
            if key not in kept and seq < keyframe.seq:
                self._drop(account, key)

    def _drop(self, account: _Account, key: _Key) -> None:
        """Forget one series of a worker, and the place that nobody needs any more."""
        place = account.places.pop(key)
        del account.seqs[key]
        entry = self._entries[place]
        del entry.by_worker[account.worker.identity, key[1]]
        entry.merged = None
        if not entry.by_worker and entry.retired is None:
            del self._entries[place]
            self._sizes[place[0]] -= OVERFLOW not in place[1]

    def _worker_names(self) -> dict[bytes, str]:
        """Return what to call those that speak: the pid, with some of the identity if that is not enough."""
        speaking = {i: a.worker.process.pid for i, a in self._accounts.items() if not a.worker.silent}
        pids = Counter(speaking.values())
        return {
            identity: str(pid) if pids[pid] == 1 else f"{pid}-{identity.hex()[:8]}"
            for identity, pid in speaking.items()
        }


def _of_each_worker(
    labels: Labels, entry: _Entry, workers: dict[bytes, str]
) -> Iterator[tuple[Labels, GaugeState]]:
    """Yield the gauge of each worker that speaks, with its name among the labels."""
    states: dict[str, list[Any]] = {}
    for (identity, _), state in entry.by_worker.items():
        if identity in workers:
            states.setdefault(workers[identity], []).append(state)
    for worker, own in states.items():
        its_labels = tuple(sorted({**dict(labels), "worker": worker}.items()))
        yield its_labels, own[0] if len(own) == 1 else GaugeState.add(own)


def _told_before(account: _Account, before: Any, item: Item, says: int) -> Number | None:
    """Return how much of a count other aggregators were told; ``None`` if it is as ``item`` says.

    A worker publishes only when it has noticed that the aggregator may be another one, and then says what the
    one before was told. A question may come before that: until then everything counts as told. What was said
    once stands, as a connection may break and come again: what is told later is new. But what a worker says
    itself is better than what its descendants say of it.
    """
    state: Any = item.state
    if item.kind == "gauge" or says > max(account.heard, _ASKED):
        return None
    told: Number
    if not account.heard:
        told = state.counted
    elif before is not None:
        told = before.origin.told
    elif account.heard == _ITSELF:
        told = 0
    else:
        return None
    return told


def snapshot_of(merged: Merged) -> Snapshot:
    """Return what a reader sees of the whole service."""
    kinds: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    for item in merged.items:
        kinds[item.name] = item.kind
        labels, states = groups.setdefault(item.name, ([], []))
        labels.append(item.labels)
        states.append(item.state)
    return Snapshot(
        Family(name, kinds[name], merged.descriptions.get(name), *group, merged.tick)
        for name, group in groups.items()
    )
