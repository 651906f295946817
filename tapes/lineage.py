"""What a forked child keeps of its parent: see `tapes.forks` for the theory."""

from __future__ import annotations

from typing import Any

from tapes.forks import Ancestor
from tapes.processes import Process
from tapes.session import Connection

__all__ = ["unpublished_by_parent"]


def unpublished_by_parent(
    registry: Any, connection: Connection | None, parent: Process, version: int
) -> tuple[Ancestor, ...]:
    """Let every metric of ``registry`` begin from zero in a forked child.

    Args:
        registry: The registry.
        connection: What the parent had attached to it.
        parent: The process that forked.
        version: When it did, as `tapes.forks.now_ns`.

    Returns:
        What the parent had recorded and not published; empty if that is nothing.
    """
    unpublished = []
    for metric in registry.metrics():
        metric.after_fork()
        aside = metric.detach_inherited()
        published = None if connection is None else connection.published((metric.name, metric.labels))
        if aside is not None and not aside.is_unchanged_since(published):
            aside.note_told(published)
            unpublished.append(aside)
    if not unpublished:
        return ()
    base = connection.published_version() if connection is not None else 0
    return (Ancestor(registry.identity, parent, version, base, unpublished, speaks=connection is not None),)
