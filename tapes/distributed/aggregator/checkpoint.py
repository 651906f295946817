"""Checkpoints: from the ledger to the records of a journal, and back.

A journal has the series of each worker, the total of those that have exited, and what the reporters have
sent. An aggregator that hands over to another one, as its files were removed, sends the same as requests.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tapes import forks, processes
from tapes.distributed.aggregator.entries import BEFORE_ALL, Source
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.aggregator.merged_view import MergedView
from tapes.distributed.protocol import messages
from tapes.distributed.protocol.messages import Item, Record, Update
from tapes.distributed.storage.saved_journal import Saved
from tapes.metrics.origin import NOWHERE, with_baseline

T = TypeVar("T")

_PIECE = 200  # maximum number of series in a record
_MAX_REMEMBERED = 10_000  # maximum number of identities of exited workers in a journal


class Checkpoint:
    """What an aggregator knows, as messages; ``configured`` is as in `.handler.Handler`."""

    def __init__(
        self, ledger: Ledger, view: MergedView, lifetime: Lifetime, configured: Mapping[str, str]
    ) -> None:
        self._ledger, self._view, self._lifetime = ledger, view, lifetime
        self._configured = tuple(configured.items())
        self._host = processes.host_id()
        self._identity = os.urandom(16)

    def living(self) -> Iterator[Record]:
        for worker in self._ledger.workers:
            yield from self.records_of(worker.identity)

    def totals(self) -> Iterator[messages.Message]:
        """Yield everything else; the totals are cut when this begins."""
        with self._ledger.lock:
            retired = self._retired_items()
            journal = messages.Journal(
                self._host, self._lifetime.owners, self._configured, self._ledger.retired,
                tuple(itertools.islice(reversed(self._ledger.exited), _MAX_REMEMBERED)),
                dict(self._ledger.names.descriptions), self._ledger.slots.max_series,
            )  # fmt: skip
        yield from self._lifetime.owners_elsewhere
        yield journal
        for items in _pieces(retired):
            yield messages.Retired(items)
        yield from self._view.cursor_records()

    def records_of(self, identity: bytes) -> list[Record]:
        with self._ledger.lock:
            account = self._ledger.accounts.get(identity)
            if account is None:  # it has exited
                return []
            worker = account.worker
            items, seqs = [], []
            for key, slot in account.slots.items():
                entry = self._ledger.slots.entries[slot]
                items.append(Item(entry.kind, *key, entry.by_worker[identity, key[1]]))
                seqs.append(account.seqs[key])
            seq, source, ancestors = max(1, account.known), account.source, tuple(account.ancestors)
        head = Update(worker.identity, worker.process, worker.host, seq, 0, [], {}, program=worker.program)
        return [
            Record(head._replace(items=some), worker.is_ancestor, source, ancestors, tuple(its_seqs))
            for some, its_seqs in zip(_pieces(items), _pieces(seqs))
        ]

    def news_of(self, update: Update, before: Mapping[bytes, Source | None]) -> Iterator[Record]:
        """Yield the records that a journal needs at once, after ``update`` was entered.

        The successor has to wait for new workers. It also needs their baselines, as what a worker sends to it
        includes what this aggregator had. ``before`` has the sources of the sender and its ancestors before.
        """
        for identity, source in before.items():
            now = self._ledger.source_of(identity)
            if now is None or now is source or source is Source.JOURNAL:
                continue
            baselines = (getattr(item.state, "origin", NOWHERE).baseline for item in update.items)
            if source is None and identity == update.identity and not any(baselines):
                head = update._replace(seq=1, base=0, items=[], descriptions={}, ancestors=())
                yield Record(head, False, now)
            else:
                yield from self.records_of(identity)

    def restore(self, saved: Saved) -> None:
        ledger, journal = self._ledger, saved.journal
        self._configured = self._configured or journal.reporters
        self._lifetime.attach(journal.host, journal.owners)
        for attach in saved.attached:
            self._lifetime.attach(attach.host, attach.processes)
        self._view.restore_cursors(saved.cursors)
        with ledger.lock:
            ledger.retired = journal.retired
            ledger.exited = OrderedDict.fromkeys(reversed(journal.retired_lately))
            ledger.names.describe(journal.descriptions, BEFORE_ALL)
            ledger.slots.max_series = max(ledger.slots.max_series, journal.max_series)
            for item in saved.retired:  # first, as they had their slots first
                self._restore_retired(item)
            for record in saved.records:
                if record.update.identity not in ledger.exited:
                    self._restore_record(record)
            ledger.drop_former_lasts()

    def _restore_retired(self, item: Item) -> None:
        state: Any = item.state
        names, slots = self._ledger.names, self._ledger.slots
        is_other_gauge = item.kind == "gauge" and state.mode != "last"
        if names.kind_of(item.name) not in (None, item.kind) or is_other_gauge:
            return
        names.enter(item.name, item.kind, BEFORE_ALL)
        entry = slots.entries[slots.take((item.name, item.labels), item.kind)]
        if item.kind == "gauge":
            names.enter_mode(item, BEFORE_ALL, "last", "last")
            state = entry.agreed(state, BEFORE_ALL)
        entry.retire(state)

    def _restore_record(self, record: Record) -> None:
        account = self._ledger.account(record.update, record.is_ancestor)
        account.known = max(account.known, record.update.seq)
        account.ancestors |= frozenset(record.ancestors)
        for item, seq in zip(record.update.items, record.seqs):
            self._ledger.put(account, seq, item, Source.JOURNAL)
        account.source = max(account.source, Source(record.source))
        if not account.worker.is_ancestor:
            self._ledger.unconfirmed.add(record.update.identity)

    def inheritance(self) -> Iterator[messages.Attach | messages.Read | messages.Goodbye]:
        """Yield the requests that hand over everything to another aggregator.

        The total goes as the last update of one more worker. All of it is baseline, as this aggregator's
        reporters make a last report.
        """
        yield messages.Attach(1, self._host, self._lifetime.owners)
        ancestors: list[Update] = []
        for worker in self._ledger.workers:
            updates = [record.update for record in self.records_of(worker.identity)]
            if worker.is_ancestor:
                ancestors += updates
            else:
                yield from (messages.Read(2, messages.NOTHING, update) for update in updates)
        with self._ledger.lock:
            total = list(map(_all_baseline, self._retired_items()))
        yield messages.Goodbye(3, Update(
            self._identity, forks.this_process(), self._host, forks.now_ns(), 0, total,
            dict(self._ledger.names.descriptions), tuple(ancestors), self._ledger.slots.max_series,
        ))  # fmt: skip

    def _retired_items(self) -> list[Item]:
        entries = self._ledger.slots.entries.items()
        retired = [Item(e.kind, *key, e.retired) for key, e in entries if e.retired is not None]
        return [*retired, *self._view.for_the_journal()]


def _all_baseline(item: Item) -> Item:
    state: Any = item.state
    return item if item.kind == "gauge" else item._replace(state=with_baseline(state, state.counted))


def _pieces(series: list[T]) -> Iterable[list[T]]:
    """Return a list in pieces; at least one, as a worker without series is one too."""
    return (series[start : start + _PIECE] for start in range(0, max(1, len(series)), _PIECE))
