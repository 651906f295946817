"""The session of a registry whose process is exiting: what is recorded after the goodbye.

Exit handlers record, and so do threads that a server leaves running. The process may end at any moment, and
none of its hooks runs again. So a value is flushed before the recording call returns: a round trip of about a
millisecond. After 0.25 s of that, a round trip takes place only after twenty times its duration, so that a
thread that records in a loop can't delay the end of the process. What it records in its last few
milliseconds may then be lost.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from tapes import threads
from tapes.registry import Registry
from tapes.session import Connect, LocalSession, Session

_BUDGET_SECONDS = 0.25  # maximum time in which every value is flushed at once
_SHARE = 20
_TOO_LONG_SECONDS = 0.9  # a round trip of this time had no reply; another one would have none either

_log = logging.getLogger("tapes.distributed")


class LateSession(LocalSession):
    """Flushes what ``registry`` records after its goodbye; ``flush`` sends it to the aggregator."""

    def __init__(self, registry: Registry, connect: Connect | None, flush: Callable[[], None]) -> None:
        super().__init__(registry, connect, looks=True)
        self.sleeps = True
        self._flush = flush
        self._lock = threads.RLock()
        self._is_busy = self._again = False
        self._spent = self._ended = self._last = 0.0

    def begin(self, connected: Session) -> None:
        """Close ``connected``, and from then on flush each value; no value is recorded between the two."""
        with self._lock:
            connected.sleeps = True
            self.registry.use(connected)  # whose `woken` calls this session's from now on
            self._run(connected.close)
            if self.registry.session is connected:  # it could not be closed
                self.registry.use(self)

    def close(self) -> None:
        """Do nothing: what is recorded after that is flushed too."""

    def resolved_for_read(self) -> Session:
        """Return the session of the registry: the one that is closing, or one that a read has connected."""
        with self._lock:  # a session that connected during a flush would have the identity that is flushed
            if self._is_busy:
                return self
            return super().resolved_for_read()

    def woken(self) -> bool:
        """Called when a value was recorded; the metrics sleep on."""
        if not self.sleeps:
            return True
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
                self._run(self._flush)
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
                    self.sleeps = False
                elif self._again:
                    action = self._flush
                    continue
                return
        except Exception:
            _log.exception("tapes could not flush what was recorded at the end of the process")
            self.sleeps = False
        finally:
            self._is_busy = False
