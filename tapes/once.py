"""A logger that logs each warning once.

A problem that comes with every request, report or scrape must not fill the log. So a warning has a key, and
only the first one of a key is logged.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable
from typing import Any

__all__ = ["OnceLogger"]


class OnceLogger:
    """Logs the first warning of each key; never raises.

    Thread and fork safety: safe from any thread, from signal handlers and from logging handlers that record
    metrics themselves. A forked child does not repeat what its parent has logged.

    Args:
        log: The logger.
        max_keys: Maximum number of keys to remember. Once it is reached, warnings of other keys are dropped,
            and the last warning that is logged says so.

    Example:
        >>> import logging
        >>> once = OnceLogger(logging.getLogger("tapes.doctest"))
        >>> once.warning("disk", "the disk is %s", "full"), once.warning("disk", "the disk is %s", "full")
        (True, False)
    """

    __slots__ = ("_known", "_log", "_max_keys")

    def __init__(self, log: logging.Logger, max_keys: int = 1024) -> None:
        self._log = log
        self._max_keys = max_keys
        self._known: dict[Hashable, object] = {}

    def warning(self, key: Hashable, message: str, *args: object, exc_info: Any = None) -> bool:
        """Log ``message`` unless ``key`` is known; return whether it was logged.

        Args:
            key: What the warning is about. Its hash and equality must be those of built-in types.
            message: The message, formatted with ``args`` as in `logging`.
            *args: Its arguments.
            exc_info: As in `logging`.
        """
        known, mine = self._known, object()
        # The key is entered before anything is logged: of several threads one logs, and a logging handler
        # that comes back here with the same key finds it.
        if len(known) >= self._max_keys or known.setdefault(key, mine) is not mine:
            return False
        if len(known) >= self._max_keys:
            message += " (tapes logs no further warnings of this kind)"
        with contextlib.suppress(Exception):  # a failing logging handler must not break the caller
            self._log.warning(message, *args, exc_info=exc_info)
        return True

    def forget(self, key: Hashable) -> None:
        """Log the next warning of ``key`` again."""
        self._known.pop(key, None)
