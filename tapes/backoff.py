"""How long to wait before another attempt."""

from __future__ import annotations


class Backoff:
    """Pauses between attempts; each is twice as long as the one before, up to a maximum.

    For use by one thread. Where several processes retry at once, add a random share to each pause.
    """

    __slots__ = ("_first_seconds", "_max_seconds", "_seconds")

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first_seconds = self._seconds = first_seconds
        self._max_seconds = max_seconds

    def next(self) -> float:
        """Return the seconds to wait now, and double them for the next time."""
        seconds = self._seconds
        self._seconds = min(2 * seconds, self._max_seconds)
        return seconds

    def reset(self) -> None:
        """Begin again with the first pause: an attempt succeeded."""
        self._seconds = self._first_seconds
