"""What is recorded after the goodbye: by exit handlers, and by threads that a server leaves running.

The process may end at any moment now, and no hook of ours runs again. So a value that is recorded is handed
over before the recording call returns: a round trip of about a millisecond. After 0.25 s of that, one round
trip in twenty times its own duration has to do, so that a thread that records in a loop can't hold up the
end of the process; what it records in its last few milliseconds may then be lost.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from tapes import threads
from tapes.registry import Registry

__all__ = ["Late"]

_BUDGET_SECONDS = 0.25
"""Maximum seconds in which every value is handed over at once."""
_SHARE = 20
_TOO_LONG_SECONDS = 0.5
"""A round trip of this many seconds had no answer; another one would have none either."""

_log = logging.getLogger("tapes.distributed")


class Late:
    """Hands over what ``registry`` records after its goodbye.

    Args:
        registry: Whose process is ending.
        hand_over: Takes what was recorded, and gives it to the aggregator.
    """

    def __init__(self, registry: Registry, hand_over: Callable[[], None]) -> None:
        self._registry = registry
        self._hand_over = hand_over
        self._lock = threads.RLock()
        self._is_busy = self._again = False
        self._spent = self._ended = self._last = 0.0

    def begin(self, goodbye: Callable[[], None]) -> None:
        """Call ``goodbye``, and from then on hand over each value; none is recorded between the two."""
        with self._lock:
            self._registry.first_use.sleep(self._woken)
            self._run(goodbye)

    def _woken(self) -> bool:
        """Called after a value was recorded; the metrics sleep on."""
        if sys.is_finalizing():  # a destructor: modules that a round trip needs may be gone
            return False
        # A thread of tapes does not wait: the goodbye may be waiting for that thread to end.
        if not self._lock.acquire(not threads.in_native_thread()):
            self._again = True
            return False
        try:
            if self._is_busy:  # a signal handler, or a log handler that records
                self._again = True
            elif self._spent < _BUDGET_SECONDS or time.monotonic() - self._ended > _SHARE * self._last:
                self._run(self._hand_over)
        finally:
            self._lock.release()
        return False

    def _run(self, action: Callable[[], None]) -> None:
        self._is_busy = True
        try:
            while True:
                self._again = False
                started = time.monotonic()
                action()
                self._ended = time.monotonic()
                self._last = self._ended - started
                self._spent += self._last
                if self._last > _TOO_LONG_SECONDS:
                    self._registry.first_use.wake = None
                elif self._again:
                    action = self._hand_over
                    continue
                return
        except Exception:
            _log.exception("tapes could not hand over what was recorded at the end of the process")
            self._registry.first_use.wake = None
        finally:
            self._is_busy = False
