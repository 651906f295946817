"""A logger that logs each warning once, so that a problem of every request does not fill the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable
from typing import Any


class OnceLogger:
    """Logs the first warning of each key; never raises.

    Thread and fork safety: safe from any thread, from signal handlers and from logging handlers that record
    metrics themselves. A forked child does not repeat what its parent has logged.

    It remembers at most ``max_keys``, and drops the warnings of further keys.
    """

    __slots__ = ("_known", "_log", "_max_keys")

    def __init__(self, log: logging.Logger, max_keys: int = 1024) -> None:
        self._log, self._max_keys = log, max_keys
        self._known: dict[Hashable, object] = {}

    def warning(self, key: Hashable, message: str, *args: object, exc_info: Any = None) -> bool:
        """Log ``message`` as `logging` does, unless ``key`` is known; return whether it was logged.

        The hash and the equality of ``key`` must be those of built-in types.
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
