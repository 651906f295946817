"""What may be attached to a registry: it tells others what that holds, and answers in its place."""

from __future__ import annotations

from tapes.metrics import State
from tapes.naming import Labels
from tapes.snapshot import Snapshot

__all__ = ["Connection"]


class Connection:
    """What answers for the whole service while it is attached to a registry.

    Attributes:
        is_aggregator: Whether this process is the one that adds up what all others count.
    """

    is_aggregator = False

    def open(self) -> None:
        """Begin to publish, if that has not begun."""

    def snapshot(self) -> Snapshot:
        """Return the merged view."""
        raise NotImplementedError

    def render(self, form: str) -> bytes:
        """Return the merged view, written in the form of that name (`tapes.exposition.FORMS`)."""
        raise NotImplementedError

    def request_ended(self, *, may_be_the_last: bool = False) -> None:
        """Called by adapters at the end of a request: publishes, if nothing else does.

        Args:
            may_be_the_last: Whether the process may end right after it, by no hook.
        """

    def published(self, series: tuple[str, Labels]) -> State | None:
        """Return the state of a series that others have been told, ``None`` if none was."""
        return None

    def published_version(self) -> int:
        """Return when, as `tapes.forks.now_ns`; 0 if nothing was."""
        return 0

    def before_fork(self) -> None:
        """Hold still: nothing of it may be under way in another thread."""

    def after_in_parent(self) -> None:
        """Go on in the parent."""

    def after_in_child(self) -> None:
        """In the child, attach another one in its own place, which opens when it is first used."""
