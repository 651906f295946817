"""The ledger: the newest state of every live worker, and one total of all exited ones.

Theory. States are cumulative, so applying an update is replacement: per series, the state with the highest
sequence number counts, and messages may be lost, repeated or overtaken. The series of an exited worker are
added to the retired total once. Its identity is remembered, so later updates of it change nothing. Gauges go
with their worker, except those that merge as ``last``: of these the newest value stays. Series are merged at
a read, and the result is kept until an update touches it. So memory and the cost of a read depend on live
workers and series, not on how many workers there ever were.

The records of ancestors are entered as if the ancestors had sent them: they have accounts like any other
worker, marked as ancestors. Where workers differ in the kind of a metric, or in how a gauge merges, as in a
rolling deploy, the most recently started worker wins. A name has at most as many label sets as its most
generous worker allows; further ones are added up in one series labelled ``overflow="true"``, apart for each
live worker.

The ledger does no I/O and knows no clock. One lock makes it safe to read from reporters' threads. `.entries`
has its parts; how it is written into a journal and restored is in `.checkpoint`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from tapes.distributed.aggregator import entries
from tapes.distributed.aggregator.entries import Account, Agreement, Key, Names, SeriesSlots, Source, Worker
from tapes.distributed.protocol.messages import Descriptions, Item, Merged, Update
from tapes.metrics.origin import with_baseline
from tapes.snapshot import Family, Snapshot
from tapes.threads import RLock

_MAX_REMEMBERED = 100_000
"""Maximum number of identities of exited workers that are remembered; late updates come within seconds."""


class Ledger:
    """Adds up the states of workers; safe from any thread.

    Attributes:
        lock: Held while the accounts and the slots are read or changed.
        accounts: By identity, the workers that have not exited.
        exited: The identities of exited workers, the last ones last.
        retired: Number of exited workers.
        unconfirmed: Workers from a journal that have sent nothing since: their newest counts may be missing.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.accounts: dict[bytes, Account] = {}
        self.slots, self.names = SeriesSlots(), Names()
        self.exited: OrderedDict[bytes, None] = OrderedDict()
        self.retired = 0
        self.unconfirmed: set[bytes] = set()
        self._numbers = itertools.count()
        self._entries = self.slots.entries
        self._memory: dict[str, Any] = {}

    @property
    def workers(self) -> list[Worker]:
        with self.lock:
            return [account.worker for account in self.accounts.values()]

    @property
    def living(self) -> int:
        """Number of live workers, without those that are only known as ancestors."""
        with self.lock:
            return sum(not a.dead and not a.worker.is_ancestor for a in self.accounts.values())

    def ancestors(self) -> set[bytes]:
        """Return the identities of the ancestors of live workers."""
        with self.lock:
            return set().union(*(a.ancestors for a in self.accounts.values() if not a.dead))

    def apply(self, update: Update, source: Source = Source.DIRECT) -> tuple[bool, list[str]]:
        """Enter a worker's update; return whether everything up to it is known now, and the refused names.

        A worker uses these in another way than newer ones do; each is returned once.
        """
        with self.lock:
            refused: list[str] = []
            for ancestor in update.ancestors:
                refused += self._apply(ancestor, min(source, Source.RELAYED), is_ancestor=True)[1]
            complete, own = self._apply(update, source)
            if complete:
                self.unconfirmed.discard(update.identity)
            return complete, refused + own

    def mark_dead(self, identity: bytes) -> None:
        """Remove the gauges of a dead worker; its counts can still be replaced by its last update."""
        with self.lock:
            account = self.accounts.get(identity)
            if account is not None and not account.dead:
                account.dead = True
                for key, slot in list(account.slots.items()):
                    if not self._outlives(slot):
                        self.drop(account, key)

    def mark_alive(self, identity: bytes) -> None:
        with self.lock:
            if identity in self.accounts:
                self.accounts[identity].dead = False

    def retire(self, identity: bytes) -> None:
        """Add what outlives a worker to the retired total; nothing if it is unknown or has exited already."""
        with self.lock:
            account = self.accounts.pop(identity, None)
            if account is None:
                return
            self.retired += not account.worker.is_ancestor
            self.unconfirmed.discard(identity)
            self.exited[identity] = None
            if len(self.exited) > _MAX_REMEMBERED:
                self.exited.popitem(last=False)
            for key, slot in list(account.slots.items()):
                if self._outlives(slot):
                    entry = self._entries[slot]
                    entry.retire(entry.by_worker[identity, key[1]])
                self.drop(account, key)

    def source_of(self, identity: bytes) -> Source | None:
        """Return the best source of a worker's updates; ``None`` if it is unknown."""
        with self.lock:
            if identity in self.accounts:
                return self.accounts[identity].source
            return Source.JOURNAL if identity in self.exited else None

    def former_selves(self, update: Update) -> list[bytes]:
        """Return the identities of workers whose process runs another program by now, as ``update`` shows.

        The newest update of that process shows its program; that may be an earlier one than ``update``.
        """
        process = (update.process, update.host)
        with self.lock:
            same = [a for a in self.accounts.values() if (a.worker.process, a.worker.host) == process]
            now = max(same, key=lambda account: account.known).worker.program if same else 0
            return [a.worker.identity for a in same if now != 0 and a.worker.program not in (0, now)]

    def merged(self, tick: int, own: Iterable[Item] = (), described: Descriptions | None = None) -> Merged:
        """Return the states of the whole service, with the aggregator's ``own`` series."""
        groups, texts = self._merged(own, described)
        items = [
            Item(kind, name, labels, state)
            for name, (kind, every_labels, states) in groups.items()
            for labels, state in zip(every_labels, states)
        ]
        return Merged(tick, items, texts)

    def snapshot(
        self, tick: int, own: Iterable[Item] = (), described: Descriptions | None = None
    ) -> Snapshot:
        """Return a snapshot of the whole service as of ``tick``, with the aggregator's ``own`` series."""
        groups, texts = self._merged(own, described)
        families = [
            Family(name, kind, texts.get(name), every_labels, states, tick)
            for name, (kind, every_labels, states) in groups.items()
        ]
        return Snapshot(families, self._memory)

    def _merged(
        self, own: Iterable[Item], described: Descriptions | None
    ) -> tuple[dict[str, entries.Group], Descriptions]:
        with self.lock:
            groups = self.slots.merged(entries.worker_names(self.accounts.values()), own)
            return groups, {**self.names.descriptions, **(described or {})}

    def account(self, update: Update, is_ancestor: bool) -> Account:
        account = self.accounts.get(update.identity)
        if account is None or (account.worker.is_ancestor and not is_ancestor):
            worker = Worker(update.identity, update.process, update.host, is_ancestor, update.program)
            if account is None:
                account = self.accounts[update.identity] = Account(worker, next(self._numbers))
            account.worker = worker
        return account

    def _apply(self, update: Update, source: Source, *, is_ancestor: bool = False) -> tuple[bool, list[str]]:
        if update.identity in self.exited:
            return True, []
        account = self.account(update, is_ancestor)
        if is_ancestor:
            account.dead = False  # it has a live child
        else:
            account.ancestors |= {ancestor.identity for ancestor in update.ancestors}
            self.slots.max_series = max(self.slots.max_series, update.max_series)
        refused = [item.name for item in update.items if not self.put(account, update.seq, item, source)]
        self.drop_former_lasts()
        account.source = max(account.source, source)
        self.names.describe(update.descriptions, account.rank)
        if update.base == 0 and not is_ancestor:
            account.keyframe = max(account.keyframe, update.seq)
            self._drop_removed(account, update)
        complete = update.base <= account.known
        if complete:
            account.known = max(account.known, update.seq)
        return complete, refused

    def put(self, account: Account, seq: int, item: Item, source: Source) -> bool:
        """Enter one series of a worker; return whether it agrees with what newer workers have."""
        key = (item.name, item.labels)
        # 1. A late state changes nothing, but a better source corrects the baseline.
        if account.seqs.get(key, 0) >= seq:
            if source > account.source:
                entry = self._entries[account.slots[key]] if key in account.slots else None
                if entry is not None and entry.kind == item.kind != "gauge":
                    entry.correct_baseline((account.worker.identity, item.labels), item.state)
            return True
        if seq < account.keyframe and key not in account.seqs:
            return True  # the series was removed since
        # 2. Of two kinds, that of the newest worker wins; a series that has a slot agrees already.
        agrees, state = True, item.state
        slot = account.slots.get(key)
        if slot is None or self._entries[slot].kind != item.kind:
            agreement = self.names.enter(item.name, item.kind, account.rank)
            if agreement is not Agreement.SAME:
                agrees = self._note_refused(account, item.name)
                if agreement is Agreement.OLDER:
                    return agrees
                self._forget(item.name)
            # 3. The slot.
            slot = account.slots[key] = self.slots.take(key, item.kind)
        entry = self._entries[slot]
        own = (account.worker.identity, item.labels)
        # 4. The baseline of a count, the merge mode of a gauge.
        baseline = entries.baseline_of(account, entry.by_worker.get(own), item, source)
        if item.kind == "gauge":
            before = entry.mode
            state = entry.agreed(item.state, account.rank)
            self.names.enter_mode(item, account.rank, before, entry.mode)
            agrees = state is item.state or self._note_refused(account, item.name)
        # 5. The state.
        entry.by_worker[own] = state if baseline is None else with_baseline(state, baseline)
        entry.merged = None
        account.seqs[key] = seq
        if account.dead and not self._outlives(slot):
            self.drop(account, key)
        return agrees

    def drop(self, account: Account, key: Key) -> None:
        """Forget a series of a worker, and its slot if nothing else is in it."""
        slot = account.slots.pop(key)
        del account.seqs[key]
        entry = self._entries[slot]
        del entry.by_worker[account.worker.identity, key[1]]
        entry.merged = None
        self.slots.free(slot)

    def drop_former_lasts(self) -> None:
        """Forget values that outlived their worker, of names that newer workers no longer merge as ``last``.

        Call it after a whole update, as a name may merge as ``last`` in some of its series only.
        """
        if not (names := self.names.maybe_former_lasts()):
            return
        for account in self.accounts.values():
            for key, slot in list(account.slots.items()) if account.dead else ():
                if key[0] in names and not self._outlives(slot):
                    self.drop(account, key)
        for slot in [slot for slot in self._entries if slot[0] in names]:
            if not self._outlives(slot):
                self._entries[slot].retired = self._entries[slot].merged = None
                self.slots.free(slot)

    def _outlives(self, slot: Key) -> bool:
        return self.names.outlives(slot[0], self._entries[slot])

    def _note_refused(self, account: Account, name: str) -> bool:
        """Note that a worker uses a name in another way than newer ones; return whether that was known."""
        known = name in account.refused
        account.refused.add(name)
        return known

    def _forget(self, name: str) -> None:
        for account in self.accounts.values():
            for key in [key for key in account.slots if key[0] == name]:
                self.drop(account, key)
        self.slots.forget(name)

    def _drop_removed(self, account: Account, keyframe: Update) -> None:
        kept = {(item.name, item.labels) for item in keyframe.items}
        for key, seq in list(account.seqs.items()):
            if key not in kept and seq < keyframe.seq:
                self.drop(account, key)
