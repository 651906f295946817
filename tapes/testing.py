"""What tests need, yours and ours."""

from __future__ import annotations

from tapes.errors import InvalidArgument

__all__ = ["ManualClock"]


class ManualClock:
    """A clock that stands still until it is told to advance; give it to ``Registry(clock=…)``.

    Args:
        start_seconds: What it shows first.

    Example:
        >>> import tapes
        >>> from tapes.testing import ManualClock
        >>> clock = ManualClock()
        >>> registry = tapes.Registry(clock=clock)
        >>> with registry.timer("page.render").time():
        ...     clock.advance(0.25)
        >>> registry.get_stats().page.render.q50
        0.25
    """

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._now_seconds = float(start_seconds)

    def __call__(self) -> float:
        """Return what it shows, in seconds."""
        return self._now_seconds

    def advance(self, seconds: float) -> None:
        """Move on by ``seconds``, zero or more."""
        if seconds < 0:
            raise InvalidArgument("advance(seconds)", got=seconds, expected="zero or more")
        self._now_seconds += seconds
