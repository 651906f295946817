"""The messages of workers and aggregators; `tapes.distributed.protocol.wire` turns them into bytes.

Workers send

    Update    the states of a worker's series: all of them, or those that changed since an earlier update
    Read      a question, with an update of the series of the process that asks
    Attach    processes for which the aggregator has to stay
    Goodbye   the last update of a worker
    Flush     a request to have the reporters report now
    HandOver  a request to make room for an aggregator of a newer version

and get a `Reply`. A `Merged` is the payload of a reply to a read of the states themselves. An aggregator's
journal has a `Journal` and its `Record` s, its `Retired` totals and its `Cursor` s, for its successor.

An update has a sequence number and names the earlier update that it continues (``base``; 0 for a *keyframe*,
which has every series). States are cumulative, so the newest state of a series replaces all before it.
Sequence numbers are moments of the host's monotonic clock in nanoseconds. They order the records of an
*ancestor*, the process that a worker was forked from: some come from its children, others from itself.
"""

from __future__ import annotations

from typing import NamedTuple

from tapes.catalogue import MAX_SERIES
from tapes.metrics import State
from tapes.naming import Labels
from tapes.processes import Process
from tapes.snapshot import Description, Family, Snapshot
from tapes.sums import Number

HEARTBEAT_SECONDS = 10.0  # maximum seconds between two publications of a worker, even if nothing has changed
HEARTBEAT_TIMEOUT_SECONDS = 6 * HEARTBEAT_SECONDS
"""Seconds without a publication after which a worker counts as dead if its pid can't be watched."""

NOTHING = "nothing"
"""In a `Read`: no payload is wanted, only the acknowledgement of the update."""
WAIT = "wait"
"""In a `Reply`: the answer is being made, and another reply follows."""

Descriptions = dict[str, Description]


class Item(NamedTuple):
    """One series: its kind, its name, its labels sorted by name, and its state."""

    kind: str
    name: str
    labels: Labels
    state: State


class Update(NamedTuple):
    """The states of a worker's series.

    Attributes:
        identity: Sixteen random bytes; a reused pid is a new worker.
        process, host: The process to watch.
        seq, base: The number of this update, from 1, and of the one that it continues; 0 for a keyframe.
        descriptions: In keyframes.
        ancestors: In keyframes: the records of the processes that this one was forked from, as of the fork.
        max_series: Maximum number of label sets of a name.
        program: The program of the process; see `tapes.processes.program_of`. 0 if that is not known.
    """

    identity: bytes
    process: Process
    host: str
    seq: int
    base: int
    items: list[Item]
    descriptions: Descriptions
    ancestors: tuple[Update, ...] = ()
    max_series: int = MAX_SERIES
    program: int = 0

    @property
    def has_something(self) -> bool:
        """Whether it has a count, a gauge that was set, or an ancestor."""
        return bool(self.ancestors) or any(not item.state.is_empty for item in self.items)


class Read(NamedTuple):
    """A question for a form of `tapes.exposition.FORMS`, ``"states"`` (a `Merged`), or `NOTHING`."""

    correlation: int
    what: str
    update: Update


class Attach(NamedTuple):
    """A request to stay for as long as one of these processes of ``host`` lives."""

    correlation: int
    host: str
    processes: tuple[Process, ...]


class Goodbye(NamedTuple):
    correlation: int
    update: Update


class Flush(NamedTuple):
    """A request to have the reporters report now; the reply comes after the reports, or 0.5 s later."""

    correlation: int


class HandOver(NamedTuple):
    """A request to write the journal and exit, as an aggregator of ``version`` is about to start.

    Its layout never changes, so every older version can read it.
    """

    correlation: int
    version: int


class Reply(NamedTuple):
    """A reply: ``"ok"``, ``"behind"`` (send a keyframe, an earlier update is missing), ``"error"`` or `WAIT`.

    The payload is the answer; for an error, a sentence.
    """

    correlation: int
    status: str
    payload: bytes


class Merged(NamedTuple):
    tick: int
    items: list[Item]
    descriptions: Descriptions

    def snapshot(self) -> Snapshot:
        kinds: dict[str, str] = {}
        groups: dict[str, tuple[list[Labels], list[State]]] = {}
        for item in self.items:
            kinds[item.name] = item.kind
            labels, states = groups.setdefault(item.name, ([], []))
            labels.append(item.labels)
            states.append(item.state)
        return Snapshot(
            Family(name, kinds[name], self.descriptions.get(name), *group, self.tick)
            for name, group in groups.items()
        )


class Journal(NamedTuple):
    """What an aggregator knows besides series; it precedes the `Retired` totals.

    Attributes:
        host: Where its pids are valid.
        owners: The processes that it serves.
        reporters: The configuration of its reporters, if that came from the environment.
        retired, retired_lately: Number of workers that have exited, and the identities of the last of them.
    """

    host: str
    owners: tuple[Process, ...]
    reporters: tuple[tuple[str, str], ...]
    retired: int
    retired_lately: tuple[bytes, ...]
    descriptions: Descriptions
    max_series: int


class Record(NamedTuple):
    """Series of one worker, and what an aggregator knows of it; see `.aggregator.entries.Account`.

    Attributes:
        ancestors: The identities of its own ancestors.
        seqs: The number of the update that brought each series.
    """

    update: Update
    is_ancestor: bool = False
    source: int = 0
    ancestors: tuple[bytes, ...] = ()
    seqs: tuple[int, ...] = ()


class Retired(NamedTuple):
    """Totals of all workers that have exited, and counts of the aggregator itself."""

    items: list[Item]


class SentCount(NamedTuple):
    """What a receiver of differences was sent of one series.

    ``sent`` is value, total and baseline at the last report (`tapes.reporting.cursor.Sent`), or ``None``.
    """

    name: str
    labels: Labels
    sent: tuple[Number, Number, Number] | None


class Cursor(NamedTuple):
    """What one receiver was sent, series by series; a later one of the same series replaces it."""

    target: str
    counts: tuple[SentCount, ...]


Message = (
    Update | Read | Attach | Goodbye | Flush | HandOver | Reply | Merged | Journal | Record | Retired | Cursor
)
