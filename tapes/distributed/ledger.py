"""The ledger: the newest state of every live worker, and one total of all that have left.

Theory. States are cumulative, so applying an update is replacement: per series, the state of the highest
sequence number stands, and messages may be lost, repeated or overtaken. A worker that leaves is added to
the retired total once and its identity remembered, so that late words of it change nothing. Gauges leave
with their worker. Merging is done per series when somebody reads, and kept until an update touches it:
memory and the cost of a read depend on live workers and series, not on how many workers have lived.

The ledger does no I/O and knows no clock. One lock makes it safe to read from reporters' threads.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from threading import RLock
from typing import NamedTuple

from tapes.distributed.wire import Descriptions, Item, Merged, Update
from tapes.metrics import KINDS, GaugeState, State
from tapes.naming import Labels
from tapes.snapshot import Family, Snapshot

__all__ = ["Ledger", "Worker"]

_REMEMBERED = 100_000
"""So many identities of workers that have left are kept; late words come within seconds."""


class Worker(NamedTuple):
    """Who a live worker is."""

    identity: bytes
    pid: int
    host: str


class _Account:
    """What is known of one worker: everything up to its update ``known``, and which one brought a series."""

    __slots__ = ("known", "seqs", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.known = 0
        self.seqs: dict[tuple[str, Labels], int] = {}


class _Entry:
    """One series: its state by worker, the total of those that left, and both merged, if nothing changed."""

    __slots__ = ("by_worker", "kind", "merged", "retired")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.by_worker: dict[bytes, State] = {}
        self.retired: State | None = None
        self.merged: State | None = None


class Ledger:
    """Adds up the states of workers; safe from any thread."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._accounts: dict[bytes, _Account] = {}
        self._entries: dict[tuple[str, Labels], _Entry] = {}
        self._kinds: dict[str, str] = {}
        self._descriptions: Descriptions = {}
        self._left: OrderedDict[bytes, None] = OrderedDict()

    @property
    def workers(self) -> list[Worker]:
        """The workers that have not left."""
        with self._lock:
            return [account.worker for account in self._accounts.values()]

    def apply(self, update: Update) -> tuple[bool, list[str]]:
        """Take in a worker's update.

        Returns:
            Whether everything up to this update is known now, and the names that were refused because
            they belong to another kind of metric.
        """
        with self._lock:
            if update.identity in self._left:
                return True, []
            account = self._accounts.get(update.identity)
            if account is None:
                worker = Worker(update.identity, update.pid, update.host)
                account = self._accounts[update.identity] = _Account(worker)
            refused = [item.name for item in update.items if not self._put(account, update.seq, item)]
            self._descriptions.update(update.descriptions)
            if update.base == 0:
                self._drop_removed(account, update)
            complete = update.base <= account.known
            if complete:
                account.known = max(account.known, update.seq)
            return complete, refused

    def retire(self, identity: bytes) -> None:
        """Add what a worker counted to the retired total; nothing if it is not known, or left already."""
        with self._lock:
            account = self._accounts.pop(identity, None)
            if account is None:
                return
            self._left[identity] = None
            if len(self._left) > _REMEMBERED:
                self._left.popitem(last=False)
            for key in account.seqs:
                entry = self._entries[key]
                state = entry.by_worker.pop(identity)
                entry.merged = None
                if entry.kind != "gauge":
                    before = () if entry.retired is None else (entry.retired,)
                    entry.retired = KINDS[entry.kind].merge((*before, state))
                self._forget_if_empty(key, entry)

    def merged(self, tick: int) -> Merged:
        """Return the states of the whole service."""
        with self._lock:
            names = self._worker_names()
            items = [
                item
                for (name, labels), entry in self._entries.items()
                for item in _merged_items(name, labels, entry, names)
            ]
            return Merged(tick, items, dict(self._descriptions))

    def snapshot(self, tick: int) -> Snapshot:
        """Return what a reader sees of the whole service as of ``tick``."""
        return snapshot_of(self.merged(tick))

    def _put(self, account: _Account, seq: int, item: Item) -> bool:
        """Take in one series of a worker; return whether its kind agrees with what is known."""
        key = (item.name, item.labels)
        if account.seqs.get(key, 0) >= seq:
            return True
        if self._kinds.setdefault(item.name, item.kind) != item.kind:
            return False
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(item.kind)
        entry.by_worker[account.worker.identity] = item.state
        entry.merged = None
        account.seqs[key] = seq
        return True

    def _drop_removed(self, account: _Account, keyframe: Update) -> None:
        """Forget the series that a worker's keyframe no longer has."""
        kept = {(item.name, item.labels) for item in keyframe.items}
        for key, seq in list(account.seqs.items()):
            if key not in kept and seq < keyframe.seq:
                del account.seqs[key]
                entry = self._entries[key]
                del entry.by_worker[account.worker.identity]
                entry.merged = None
                self._forget_if_empty(key, entry)

    def _forget_if_empty(self, key: tuple[str, Labels], entry: _Entry) -> None:
        if not entry.by_worker and entry.retired is None:
            del self._entries[key]

    def _worker_names(self) -> dict[bytes, str]:
        """Return what to call each worker: its pid, with some of its identity where that is not enough."""
        pids = Counter(account.worker.pid for account in self._accounts.values())
        return {
            identity: str(account.worker.pid)
            if pids[account.worker.pid] == 1
            else f"{account.worker.pid}-{identity.hex()[:8]}"
            for identity, account in self._accounts.items()
        }


def _merged_items(name: str, labels: Labels, entry: _Entry, workers: dict[bytes, str]) -> Iterable[Item]:
    if entry.merged is None:
        retired = () if entry.retired is None else (entry.retired,)
        entry.merged = KINDS[entry.kind].merge((*retired, *entry.by_worker.values()))
    if isinstance(entry.merged, GaugeState) and entry.merged.mode == "each":
        for identity, state in entry.by_worker.items():
            own = {**dict(labels), "worker": workers[identity]}
            yield Item(entry.kind, name, tuple(sorted(own.items())), state)
    else:
        yield Item(entry.kind, name, labels, entry.merged)


def snapshot_of(merged: Merged) -> Snapshot:
    """Return what a reader sees of the whole service."""
    groups: dict[str, list[Item]] = {}
    for item in merged.items:
        groups.setdefault(item.name, []).append(item)
    return Snapshot(
        Family.of(
            name,
            items[0].kind,
            merged.descriptions.get(name),
            [(item.labels, item.state) for item in items],
            merged.tick,
        )
        for name, items in groups.items()
    )
