"""The entries of a ledger: one account for each worker, and one entry for each series."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from tapes.distributed.protocol.messages import Item, Update
from tapes.metrics import KINDS, GaugeState, State
from tapes.metrics.origin import with_baseline
from tapes.naming import Labels
from tapes.processes import Process
from tapes.sums import Number

Key = tuple[str, Labels]
Rank = tuple[int, int]

BEFORE_ALL: Rank = (-1, -1)
"""The rank of no worker: every worker is newer."""


class Source(IntEnum):
    """Where an update comes from; the baselines of a better source replace those of a worse one."""

    READ = 0
    RELAYED = 1  # in the update of a descendant
    DIRECT = 2  # the worker published it, or exited with it
    JOURNAL = 3


class Worker(NamedTuple):
    """A worker that has not exited.

    Attributes:
        is_ancestor: Whether it is known only from the updates of its descendants.
        program: The program of its process; see `tapes.processes.program_of`. 0 if that is not known.
    """

    identity: bytes
    process: Process
    host: str
    is_ancestor: bool
    program: int = 0


class Account:
    """Everything known of one worker.

    Attributes:
        rank: Greater than the rank of workers that started earlier.
        known: Every update up to this one is known.
        keyframe: The number of the last keyframe.
        source: The best source of its updates so far.
        seqs: By series, the number of the update that brought it.
        slots: By series, the key of its entry.
        refused: The names that it uses in another way than newer workers do.
    """

    __slots__ = (
        "ancestors", "dead", "keyframe", "known", "rank", "refused", "seqs", "slots", "source", "worker",
    )  # fmt: skip

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
        self.mode = ""
        self.mode_rank = BEFORE_ALL
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
    baseline: Number
    if account.source is Source.READ:
        baseline = state.counted
    elif before is not None:
        baseline = before.origin.baseline
    elif account.source is Source.DIRECT:
        baseline = 0
    else:
        return None
    return baseline


def former_selves(accounts: Iterable[Account], update: Update) -> list[bytes]:
    """Return the identities of workers whose process runs another program by now, as ``update`` shows.

    The newest update of that process shows its program; that may be an earlier one than ``update``.
    """
    same = [a for a in accounts if (a.worker.process, a.worker.host) == (update.process, update.host)]
    now = max(same, key=lambda account: account.known).worker.program if same else 0
    return [a.worker.identity for a in same if now != 0 and a.worker.program not in (0, now)]


def worker_names(accounts: Iterable[Account]) -> dict[bytes, str]:
    """Return names for the workers that publish: the pid, with part of the identity if two share a pid."""
    publishing = {a.worker.identity: a.worker.process.pid for a in accounts if not a.worker.is_ancestor}
    pids = collections.Counter(publishing.values())
    return {
        identity: str(pid) if pids[pid] == 1 else f"{pid}-{identity.hex()[:8]}"
        for identity, pid in publishing.items()
    }
