"""What workers and an aggregator say to each other; `tapes.distributed.protocol.wire` turns it into bytes.

Workers send

    Update    what a worker's series stand at: all of them, or those that changed since an earlier update
    Read      a question, with an update of what the asker holds
    Attach     which processes to stay for
    Goodbye   a worker's last update
    Flush     a request to have reporters report now
    HandOver  a request to make room for an aggregator of a newer version

and get a `Reply`. A `Merged` is the payload of a reply to a reader that wants the states themselves. To the
one that takes its place after a crash, an aggregator leaves a `Journal` and its `Record` s.

An update has a sequence number, and says after which earlier one it continues (``base``; 0 for a *keyframe*,
which has every series). States are cumulative, so the newest of a series supersedes all before it. Numbers
are moments of the host's monotonic clock in nanoseconds, so that what a forked child says of its parent (an
*ancestor*) is in order with what the parent says itself.
"""

from __future__ import annotations

from typing import NamedTuple

from tapes.catalogue import MAX_SERIES
from tapes.metrics import State
from tapes.naming import Labels
from tapes.processes import Process
from tapes.snapshot import Description, Family, Snapshot

__all__ = [
    "ALIVE_SECONDS",
    "NOBODY",
    "NOTHING",
    "SILENT_SECONDS",
    "Attach",
    "Descriptions",
    "Flush",
    "Goodbye",
    "HandOver",
    "Item",
    "Journal",
    "Merged",
    "Message",
    "Read",
    "Record",
    "Reply",
    "Update",
]  # fmt: skip

ALIVE_SECONDS = 10.0
"""Maximum seconds between two publications of a worker, also if nothing has changed."""
SILENT_SECONDS = 6 * ALIVE_SECONDS
"""Seconds without a publication after which a worker counts as dead if its pid can't be watched."""

Descriptions = dict[str, Description]
Group = tuple[list[Labels], list[State]]


class Item(NamedTuple):
    """One series: its kind, its name, its labels sorted by name, and its state."""

    kind: str
    name: str
    labels: Labels
    state: State


class Update(NamedTuple):
    """What a worker's series stand at.

    Attributes:
        identity: Sixteen random bytes; a reused pid is a new worker.
        process, host: Whose death to watch for.
        seq: The number of this update, from 1.
        base: The update that this one continues; 0 for a keyframe, which has every series.
        items: The series.
        descriptions: In keyframes.
        ancestors: In keyframes: what processes that this one descends from had recorded when they forked.
        max_series: How many label sets of a name the worker allows.
        program: What the process runs; see `tapes.processes.program_of`. 0 if that is not known.
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
        """Whether there is something in it: a count, a gauge that was set, what an ancestor had recorded."""
        return bool(self.ancestors) or any(not item.state.is_empty for item in self.items)


NOTHING = "nothing"


class Read(NamedTuple):
    """A question: ``what`` is a form of `tapes.exposition.FORMS`, or ``"states"`` for a `Merged`.

    With `NOTHING` there is no payload: the worker wants to know that its update has arrived.
    """

    correlation: int
    what: str
    update: Update


class Attach(NamedTuple):
    """A request to stay for as long as one of these processes of ``host`` lives."""

    correlation: int
    host: str
    processes: tuple[Process, ...]


class Goodbye(NamedTuple):
    """A worker's last words."""

    correlation: int
    update: Update


class Flush(NamedTuple):
    """A request to have reporters report now; the reply comes after the reports, or 0.5 s later.

    An aggregator of an earlier release refuses it.
    """

    correlation: int


class HandOver(NamedTuple):
    """A request to write down everything and leave, as an aggregator of ``version`` is about to start.

    Its layout never changes, so that every older version understands it.
    """

    correlation: int
    version: int


WAIT = "wait"


class Reply(NamedTuple):
    """An answer.

    Attributes:
        correlation: Of the question.
        status: ``"ok"``, ``"behind"`` (send a keyframe, some of what it builds on is missing),
            ``"error"``, or `WAIT` (the answer is being made, and another reply follows).
        payload: The answer; for an error, a sentence.
    """

    correlation: int
    status: str
    payload: bytes


class Merged(NamedTuple):
    """The states of the whole service."""

    tick: int
    items: list[Item]
    descriptions: Descriptions

    def snapshot(self) -> Snapshot:
        """Return what a reader sees of the whole service."""
        kinds: dict[str, str] = {}
        groups: dict[str, Group] = {}
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
    """What an aggregator knows, but the series; those are in the records that follow.

    Attributes:
        host: Where the pids mean something.
        owners: The processes that it serves.
        reporters: How its reporters are configured, if by the environment.
        retired: How many workers have left.
        left: Whose words are not to be heard again: workers that have left lately.
        descriptions: Of all names.
        max_series: How many label sets a name may have.
    """

    host: str
    owners: tuple[Process, ...]
    reporters: tuple[tuple[str, str], ...]
    retired: int
    left: tuple[bytes, ...]
    descriptions: Descriptions
    max_series: int


class Record(NamedTuple):
    """Series of one worker, or of the total of all that have left.

    Attributes:
        update: What it said; under the identity `NOBODY` for the total.
        silent: Whether it is known only by what its descendants say of it.
        ancestors: The identities of whom it descends from.
        seqs: The number of the update that brought each series.
    """

    update: Update
    silent: bool = False
    ancestors: tuple[bytes, ...] = ()
    seqs: tuple[int, ...] = ()


NOBODY = bytes(16)
"""The identity of no worker: the aggregator itself, and the total of those that have left."""

Message = Update | Read | Attach | Goodbye | Flush | HandOver | Reply | Merged | Journal | Record
