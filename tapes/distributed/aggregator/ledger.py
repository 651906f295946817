"""The ledger: the newest state of every live worker, and one total of all that have left.

Theory. States are cumulative, so applying an update is replacement: per series, the state of the highest
sequence number stands, and messages may be lost, repeated or overtaken. A worker that leaves is added to the
retired total once and its identity remembered, so that late words of it change nothing. Gauges leave with
their worker, except those that merge as ``last``: of these the newest value stays. Merging is done per series
when somebody reads, and kept until an update touches it: memory and the cost of a read depend on live workers
and series, not on how many workers have lived.

What a worker says of its ancestors is entered as if they had said it themselves: they are accounts like any
other, only silent ones. Where workers differ in the kind of a metric, or in how a gauge merges, as in a
rolling deploy, the one that started last is right. A name has at most as many label sets as its most generous
worker allows; what comes after them is added up in one series labelled ``overflow="true"``, apart for each
worker that still lives.

The ledger does no I/O and knows no clock. One lock makes it safe to read from reporters' threads.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from tapes.distributed.aggregator import entries
from tapes.distributed.aggregator.entries import (
    ASKED,
    BEFORE_ALL,
    ITSELF,
    OF_IT,
    Account,
    Entry,
    Key,
    Rank,
    Worker,
)
from tapes.distributed.aggregator.series_slots import Places
from tapes.distributed.protocol.messages import NOBODY, Descriptions, Item, Journal, Merged, Record, Update
from tapes.metrics import GaugeState, State
from tapes.metrics.origin import with_told
from tapes.processes import Process
from tapes.snapshot import Family, Snapshot
from tapes.threads import RLock

__all__ = ["Ledger"]

_REMEMBERED = 100_000
"""So many identities of workers that have left are kept; late words come within seconds."""

_REMEMBERED_BY_JOURNALS = 10_000


class Ledger:
    """Adds up the states of workers; safe from any thread."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._accounts: dict[bytes, Account] = {}
        self._numbers = itertools.count()
        self._places = Places()
        self._entries = self._places.entries
        self._kinds: dict[str, str] = {}
        self._ranks: dict[str, Rank] = {}
        self._lasts: dict[str, Rank] = {}  # of names that merge as "last": the newest worker's that says so
        self._maybe_former: set[str] = set()  # names that may no longer merge as "last"
        self._described_by: dict[str, Rank] = {}
        self._descriptions: Descriptions = {}
        self._left: OrderedDict[bytes, None] = OrderedDict()
        self._memory: dict[str, Any] = {}
        self.retired = 0

    @property
    def descriptions(self) -> Descriptions:
        """What was said of each name."""
        with self._lock:
            return dict(self._descriptions)

    @property
    def max_series(self) -> int:
        """How many label sets a name may have."""
        return self._places.max_series

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
            Whether everything up to this update is known now, and the names that workers use in another way
            than newer ones do; each is told once of a worker.
        """
        with self._lock:
            refused: list[str] = []
            for ancestor in update.ancestors:
                refused += self._apply(ancestor, silent=True, published=published)[1]
            complete, own = self._apply(update, silent=False, published=published)
            return complete, refused + own

    def bury(self, identity: bytes, *, is_dead: bool = True) -> None:
        """Let the gauges of a worker that died leave; what stays can still be replaced by last words.

        Unless ``is_dead``, it lives again: it was silent for long.
        """
        with self._lock:
            account = self._accounts.get(identity)
            if account is not None and account.dead is not is_dead:
                account.dead = is_dead
                for key, place in list(account.places.items()):
                    if is_dead and not self._outlives(place):
                        self._drop(account, key)

    def retire(self, identity: bytes) -> None:
        """Add what outlives a worker to the retired total; nothing if it is not known, or left already."""
        with self._lock:
            account = self._accounts.pop(identity, None)
            if account is None:
                return
            self.retired += not account.worker.silent
            self._left[identity] = None
            if len(self._left) > _REMEMBERED:
                self._left.popitem(last=False)
            for key in list(account.places):
                place = account.places[key]
                if self._outlives(place):
                    entry = self._entries[place]
                    entry.retire(entry.by_worker[identity, key[1]])
                self._drop(account, key)

    def knows(self, identity: bytes) -> bool:
        """Return whether this worker has been heard of, also if it has left."""
        with self._lock:
            return identity in self._accounts or identity in self._left

    def former_selves(self, update: Update) -> list[bytes]:
        """Return the identities of workers whose process has become another program; see `accounts`."""
        with self._lock:
            return entries.former_selves(self._accounts.values(), update)

    def records_of(self, identity: bytes) -> list[Record]:
        """Return what is known of a worker; nothing if it has left."""
        with self._lock:
            account = self._accounts.get(identity)
            if account is None:
                return []
            worker = account.worker
            items, seqs = [], []
            for key, place in account.places.items():
                entry = self._entries[place]
                items.append(Item(entry.kind, *key, entry.by_worker[identity, key[1]]))
                seqs.append(account.seqs[key])
        head = Update(
            identity, worker.process, worker.host, max(1, account.known), 0, [], {}, program=worker.program
        )  # fmt: skip
        ancestors = tuple(account.ancestors)
        return [
            Record(head._replace(items=some), worker.silent, ancestors, tuple(its_seqs))
            for some, its_seqs in entries.pieces(items, seqs)
        ]

    def records_of_retired(self, more: list[Item]) -> tuple[list[Record], tuple[bytes, ...], int]:
        """Return the total of those that left, with ``more``; who left lately; and how many did."""
        with self._lock:
            items = [
                Item(e.kind, *key, e.retired) for key, e in self._entries.items() if e.retired is not None
            ]
            left = tuple(itertools.islice(reversed(self._left), _REMEMBERED_BY_JOURNALS))
            retired = self.retired
        head = Update(NOBODY, Process(1, 0), "", 1, 0, [], {})
        every = [*items, *more]
        records = [
            Record(head._replace(items=some), True, (), tuple(seqs))
            for some, seqs in entries.pieces(every, [1] * len(every))
        ]
        return records, left, retired

    def restore(self, journal: Journal, records: Iterable[Record]) -> None:
        """Take over what another ledger had written down: everything in it was told to an aggregator."""
        with self._lock:
            self.retired = journal.retired
            self._left = OrderedDict.fromkeys(reversed(journal.left))
            self._descriptions.update(journal.descriptions)
            self._places.max_series = max(self.max_series, journal.max_series)
            # The total first: it had its places first.
            for record in sorted(records, key=lambda record: record.update.identity != NOBODY):
                if record.update.identity == NOBODY:
                    for item in record.update.items:
                        self._restore_retired(item)
                elif record.update.identity not in self._left:
                    account = self._account(record.update, record.silent)
                    account.known = max(account.known, record.update.seq)
                    account.ancestors = frozenset(record.ancestors)
                    for item, seq in zip(record.update.items, record.seqs):
                        self._put(account, seq, item, ASKED)
            self._let_former_go()

    def _restore_retired(self, item: Item) -> None:
        state: Any = item.state
        if item.kind == "gauge" and state.mode != "last":
            return
        if self._kinds.setdefault(item.name, item.kind) == item.kind:
            self._ranks.setdefault(item.name, BEFORE_ALL)
            entry = self._entries[self._places.take((item.name, item.labels), item.kind)]
            if item.kind == "gauge":
                self._lasts.setdefault(item.name, BEFORE_ALL)
                entry.retire(entry.agreed(state, BEFORE_ALL))
            else:
                entry.retire(with_told(state, state.counted))

    def merged(self, tick: int) -> Merged:
        """Return the states of the whole service."""
        with self._lock:
            items = [
                Item(self._kinds[name], name, labels, state)
                for name, group in self._places.merged(entries.names_of(self._accounts.values())).items()
                for labels, state in zip(*group)
            ]
            return Merged(tick, items, dict(self._descriptions))

    def snapshot(self, tick: int) -> Snapshot:
        """Return what a reader sees of the whole service as of ``tick``."""
        with self._lock:
            families = [
                Family(name, self._kinds[name], self._descriptions.get(name), *group, tick)
                for name, group in self._places.merged(entries.names_of(self._accounts.values())).items()
            ]
        return Snapshot(families, self._memory)

    def _account(self, update: Update, silent: bool) -> Account:
        """Return the account of who says ``update``; a new one, if it has not been heard of before."""
        account = self._accounts.get(update.identity)
        if account is None or (account.worker.silent and not silent):
            worker = Worker(update.identity, update.process, update.host, silent, update.program)
            if account is None:
                account = self._accounts[update.identity] = Account(worker, next(self._numbers))
            account.worker = worker
        return account

    def _apply(self, update: Update, *, silent: bool, published: bool) -> tuple[bool, list[str]]:
        if update.identity in self._left:
            return True, []
        account = self._account(update, silent)
        if silent:
            account.dead = False  # a living child speaks of it
        else:
            account.ancestors |= {ancestor.identity for ancestor in update.ancestors}
            self._places.max_series = max(self.max_series, update.max_series)
        says = ITSELF if published and not silent else OF_IT if published else ASKED
        refused = [item.name for item in update.items if not self._put(account, update.seq, item, says)]
        self._let_former_go()
        account.heard = max(account.heard, says)
        for name, description in update.descriptions.items():
            if account.rank >= self._described_by.get(name, account.rank):
                self._described_by[name] = account.rank
                self._descriptions[name] = description
        if update.base == 0 and not silent:
            self._drop_removed(account, update)
        complete = update.base <= account.known
        if complete:
            account.known = max(account.known, update.seq)
        return complete, refused

    def _put(self, account: Account, seq: int, item: Item, says: int) -> bool:
        """Take in one series of a worker; return whether it agrees with what newer workers have."""
        key = (item.name, item.labels)
        if account.seqs.get(key, 0) >= seq:
            if says > account.heard:  # a question has overtaken it
                self._note_told(account, key, item)
            return True
        agrees, state = True, item.state
        if self._kinds.setdefault(item.name, item.kind) != item.kind:
            if account.rank < self._ranks[item.name]:
                return self._complained(account, item.name)
            self._forget(item.name)
            self._kinds[item.name] = item.kind
            agrees = self._complained(account, item.name)
        if self._ranks.setdefault(item.name, account.rank) < account.rank:
            self._ranks[item.name] = account.rank
            self._maybe_former.add(item.name)
        place = account.places.get(key)
        if place is None:
            place = account.places[key] = self._places.take(key, item.kind)
        entry = self._entries[place]
        whose = (account.worker.identity, item.labels)
        told = entries.told_before(account, entry.by_worker.get(whose), item, says)
        if item.kind == "gauge":
            state = self._agreed(account, item, entry)
            agrees = state is item.state or self._complained(account, item.name)
        entry.by_worker[whose] = state if told is None else with_told(state, told)
        entry.merged = None
        account.seqs[key] = seq
        if account.dead and not self._outlives(place):
            self._drop(account, key)
        return agrees

    def _agreed(self, account: Account, item: Item, entry: Entry) -> State:
        """Return a gauge's state in the mode of the newest worker that has it."""
        mode = entry.mode
        state = entry.agreed(item.state, account.rank)
        assert isinstance(item.state, GaugeState)
        if item.state.mode == "last":
            self._lasts[item.name] = max(self._lasts.get(item.name, BEFORE_ALL), account.rank)
        if mode == "last" != entry.mode:
            self._maybe_former.add(item.name)
        return state

    def _outlives(self, place: Key) -> bool:
        """Return whether a series stays when its worker has ended: a count, or a last value.

        It is a last value if the newest worker that has it says so, and the newest that has its name still
        merges some series of that name so.
        """
        name, entry = place[0], self._entries[place]
        if entry.kind != "gauge":
            return True
        return entry.mode == "last" and self._lasts.get(name, BEFORE_ALL) >= self._ranks[name]

    def _let_former_go(self) -> None:
        """Forget values that stayed of names which newer workers no longer merge as ``last``.

        It is called after a whole update, as a name may merge as ``last`` in some of its series only.
        """
        names, self._maybe_former = self._maybe_former & self._lasts.keys(), set()
        if not names:
            return
        for account in self._accounts.values():
            for key, place in list(account.places.items()) if account.dead else ():
                if key[0] in names and not self._outlives(place):
                    self._drop(account, key)
        for place in [place for place in self._entries if place[0] in names]:
            if not self._outlives(place):
                self._entries[place].retired = self._entries[place].merged = None
                self._places.free(place)

    def _complained(self, account: Account, name: str) -> bool:
        """Note that a worker uses a name in another way than newer ones; return whether that was known."""
        known = name in account.refused
        account.refused.add(name)
        return known

    def _forget(self, name: str) -> None:
        """Forget all series of a name, as it is another kind of metric now."""
        for account in self._accounts.values():
            for key in [key for key in account.places if key[0] == name]:
                self._drop(account, key)
        self._places.forget(name)
        self._lasts.pop(name, None)

    def _note_told(self, account: Account, key: Key, item: Item) -> None:
        """Take from ``item`` what aggregators before this one were told."""
        entry = self._entries[account.places[key]] if key in account.places else None
        if entry is not None and entry.kind == item.kind != "gauge":
            whose = (account.worker.identity, item.labels)
            given: Any = item.state
            entry.by_worker[whose] = with_told(entry.by_worker[whose], given.origin.told)
            entry.merged = None

    def _drop_removed(self, account: Account, keyframe: Update) -> None:
        """Forget the series that a worker's keyframe no longer has."""
        kept = {(item.name, item.labels) for item in keyframe.items}
        for key, seq in list(account.seqs.items()):
            if key not in kept and seq < keyframe.seq:
                self._drop(account, key)

    def _drop(self, account: Account, key: Key) -> None:
        """Forget one series of a worker, and the place that nobody needs any more."""
        place = account.places.pop(key)
        del account.seqs[key]
        entry = self._entries[place]
        del entry.by_worker[account.worker.identity, key[1]]
        entry.merged = None
        self._places.free(place)
