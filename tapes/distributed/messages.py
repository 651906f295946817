"""What workers and an aggregator say to each other; `tapes.distributed.wire` turns it into bytes.

Workers send

    Update    what a worker's series stand at: all of them, or those that changed since an earlier update
    Read      a question, with an update of what the asker holds
    Hello     which processes to stay for
    Goodbye   a worker's last update

and get a `Reply`. A `Merged` is the payload of a reply to a reader that wants the states themselves.

An update has a sequence number, and says after which earlier one it continues (``base``; 0 for a *keyframe*,
which has every series). States are cumulative, so the newest of a series supersedes all before it. Numbers
are moments of the host's monotonic clock in nanoseconds, so that what a forked child says of its parent (an
*ancestor*) is in order with what the parent says itself.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from tapes.catalogue import MAX_SERIES
from tapes.forks import Process
from tapes.metrics import State
from tapes.naming import Labels
from tapes.snapshot import Description

__all__ = [
    "Descriptions", "Goodbye", "Hello", "Item", "Merged", "Message", "Read", "Reply", "Update",
]  # fmt: skip

Descriptions = dict[str, Description]


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


class Read(NamedTuple):
    """A question: ``what`` is a form of `tapes.exposition.FORMS`, or ``"states"`` for a `Merged`."""

    correlation: int
    what: str
    update: Update


class Hello(NamedTuple):
    """A request to stay for as long as one of these processes of ``host`` lives."""

    correlation: int
    host: str
    processes: tuple[Process, ...]


class Goodbye(NamedTuple):
    """A worker's last words."""

    correlation: int
    update: Update


class Reply(NamedTuple):
    """An answer.

    Attributes:
        correlation: Of the question.
        status: ``"ok"``, ``"behind"`` (send a keyframe, some of what it builds on is missing) or
            ``"error"``.
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


Message = Union[Update, Read, Hello, Goodbye, Reply, Merged]
