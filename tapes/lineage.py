"""Under which identity a registry counts, and what its process inherited; `tapes.forks` has the theory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tapes.forks import Ancestor
from tapes.metrics import State
from tapes.naming import Labels
from tapes.processes import Process
from tapes.session import Session


class Lineage:
    """The identity of ``registry`` in this process, and the records of the processes before it.

    Attributes:
        identity: Sixteen random bytes; others in each process, and after each goodbye.
        ancestors: What processes that this one was forked from had recorded and not published.
    """

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self.identity = os.urandom(16)
        self.ancestors: tuple[Ancestor, ...] = ()

    def begin_in_child(self, session: Session, parent: Process, version: int) -> None:
        """Have every metric begin from zero in a forked child, and keep what the parent had not published.

        ``session`` is that of the parent, ``version`` the time of the fork, as `tapes.forks.now_ns`.
        """
        unpublished = []
        for metric in self._registry.metrics():
            metric.after_fork()
            aside = metric.detach_inherited()
            published = session.published((metric.name, metric.labels))
            if aside is not None and not aside.is_unchanged_since(published):
                aside.note_baseline(published)
                unpublished.append(aside)
        if unpublished:
            base, is_connected = session.published_version(), session.is_connected
            self.ancestors += (Ancestor(self.identity, parent, version, base, unpublished, is_connected),)
        self.identity = os.urandom(16)

    def drain(self) -> Iterator[tuple[str, str, Labels, State]]:
        """Yield kind, name, labels and state of every series, and begin again from zero."""
        for metric in self._registry.metrics():
            yield metric.kind, metric.name, metric.labels, metric.drain()
        self.ancestors = ()  # last: a child that is forked meanwhile reports them
        self.identity = os.urandom(16)
