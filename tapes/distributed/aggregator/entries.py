"""What a ledger keeps of one worker, and of one series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tapes.distributed.protocol.messages import Item, Update
from tapes.metrics import KINDS, GaugeState, State
from tapes.metrics.origin import with_told
from tapes.naming import Labels
from tapes.processes import Process
from tapes.sums import Number

__all__ = [
    "ASKED", "BEFORE_ALL", "ITSELF", "OF_IT", "Account", "Entry", "Key", "Rank", "Worker", "as_told",
    "former_selves", "names_of", "pieces", "told_before",
]  # fmt: skip

ASKED, OF_IT, ITSELF = range(3)
"""How a worker was heard: it asked, descendants published what they know of it, or it did itself."""

Key = tuple[str, Labels]
Rank = tuple[int, int]

BEFORE_ALL: Rank = (-1, -1)
"""The rank of no worker: every worker is newer."""
_PIECE = 200
"""Maximum number of series in a record of a journal."""


class Worker(NamedTuple):
    """Who a live worker is; a silent one is known only by what its descendants say of it.

    Attributes:
        program: What its process runs; see `tapes.processes.program_of`. 0 if that is not known.
    """

    identity: bytes
    process: Process
    host: str
    silent: bool
    program: int = 0


class Account:
    """What is known of one worker: everything up to its update ``known``, and which one brought a series.

    Attributes:
        rank: Greater than that of workers that started earlier.
        refused: The names that it uses in another way than newer workers do.
    """

    __slots__ = ("ancestors", "dead", "heard", "known", "places", "rank", "refused", "seqs", "worker")

    def __init__(self, worker: Worker, number: int) -> None:
        self.worker = worker
        self.rank = (worker.process.started, number)
        self.known = 0
        self.heard = ASKED
        self.dead = False
        self.seqs: dict[Key, int] = {}
        self.places: dict[Key, Key] = {}
        self.ancestors: frozenset[bytes] = frozenset()
        self.refused: set[str] = set()


class Entry:
    """One series: its state by worker, the total of those that left, and both merged, if nothing changed.

    States are kept by worker and the labels that it gave: an overflowing series has several of one worker.

    Attributes:
        mode, mode_rank: How a gauge merges, and the rank of the newest worker that says so.
        retired: The total of those that left; for a gauge that merges as ``last``, the newest value that
            one of them set. Other gauges have none.
    """

    __slots__ = ("by_worker", "kind", "merged", "mode", "mode_rank", "retired")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.mode = ""
        self.mode_rank = BEFORE_ALL
        self.by_worker: dict[tuple[bytes, Labels], State] = {}
        self.retired: State | None = None
        self.merged: State | None = None

    def whole(self) -> State:
        """Return the state of all workers together."""
        if self.merged is None:
            retired = () if self.retired is None else (self.retired,)
            self.merged = KINDS[self.kind].merge((*retired, *self.by_worker.values()))
        return self.merged

    def retire(self, state: State) -> None:
        """Add ``state`` to the total of those that left; a gauge counts if it has a value that was set."""
        if isinstance(state, GaugeState) and (state.value is None or state.since is None):
            return
        before = () if self.retired is None else (self.retired,)
        self.retired = KINDS[self.kind].merge((*before, state))
        self.merged = None

    def agreed(self, state: State, rank: Rank) -> State:
        """Return a gauge's state in the mode of the newest worker that has it; what is known follows it."""
        assert isinstance(state, GaugeState)
        if rank < self.mode_rank:
            return state if state.mode == self.mode else state._replace(mode=self.mode)
        self.mode_rank = rank
        if state.mode == self.mode:
            return state
        self.mode = state.mode
        self.retired = None  # it merged as ``last`` before, if at all
        for whose, known in self.by_worker.items():
            assert isinstance(known, GaugeState)
            self.by_worker[whose] = known._replace(mode=state.mode)
        return state

    def of_each_worker(
        self, labels: Labels, workers: dict[bytes, str]
    ) -> Iterator[tuple[Labels, GaugeState]]:
        """Yield the gauge of each worker that speaks, with its name among the labels."""
        states: dict[str, list[Any]] = {}
        for (identity, _), state in self.by_worker.items():
            if identity in workers:
                states.setdefault(workers[identity], []).append(state)
        for worker, own in states.items():
            its_labels = tuple(sorted({**dict(labels), "worker": worker}.items()))
            yield its_labels, own[0] if len(own) == 1 else GaugeState.add(own)


def told_before(account: Account, before: Any, item: Item, says: int) -> Number | None:
    """Return how much of a count other aggregators were told; ``None`` if it is as ``item`` says.

    A worker publishes only when it has noticed that the aggregator may be another one, and then says what the
    one before was told. A question may come before that: until then everything counts as told. What was said
    once stands, as a connection may break and come again: what is told later is new. But what a worker says
    itself is better than what its descendants say of it.
    """
    state: Any = item.state
    if item.kind == "gauge" or says > max(account.heard, ASKED):
        return None
    told: Number
    if not account.heard:
        told = state.counted
    elif before is not None:
        told = before.origin.told
    elif account.heard == ITSELF:
        told = 0
    else:
        return None
    return told


def former_selves(accounts: Iterable[Account], update: Update) -> list[bytes]:
    """Return the identities of workers whose process has become another program since, as ``update`` shows.

    The one that was heard last is what the process is now; that may not be the sender of ``update``.
    """
    same = [a for a in accounts if (a.worker.process, a.worker.host) == (update.process, update.host)]
    now = max(same, key=lambda account: account.known).worker.program if same else 0
    return [a.worker.identity for a in same if now != 0 and a.worker.program not in (0, now)]


def as_told(item: Item) -> Item:
    """Return ``item`` with all that it counts as told to an aggregator before."""
    state: Any = item.state
    return item if item.kind == "gauge" else item._replace(state=with_told(state, state.counted))


def names_of(accounts: Iterable[Account]) -> dict[bytes, str]:
    """Return names for the workers that publish: the pid, with part of the identity if two have the same."""
    publishing = {a.worker.identity: a.worker.process.pid for a in accounts if not a.worker.silent}
    pids = Counter(publishing.values())
    return {
        identity: str(pid) if pids[pid] == 1 else f"{pid}-{identity.hex()[:8]}"
        for identity, pid in publishing.items()
    }


def pieces(items: list[Item], seqs: list[int]) -> Iterator[tuple[list[Item], list[int]]]:
    """Yield both in pieces; at least one, as a worker without series is one too."""
    for start in range(0, max(1, len(items)), _PIECE):
        yield items[start : start + _PIECE], seqs[start : start + _PIECE]
