"""The thread that runs the producers of gauges, so that neither a request nor a publication waits for one."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from tapes import threads
from tapes.metrics import Gauge
from tapes.registry import Registry

_INTERVAL_SECONDS = 1.0  # after which a producer runs again
_FIRST_WAIT_SECONDS = 0.5  # maximum time that a read waits for producers that have not run yet


class Producers:
    """Runs the producers of a registry once a second, in a thread that the first of them starts."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._thread: threads.NativeThread | None = None
        self._starting: Any = threads.unpatched("_thread", "allocate_lock")()
        self._stopped = False
        self._ran = threading.Event()
        self._wake: Any = threads.unpatched("_thread", "allocate_lock")()
        self._wake.acquire()

    def ensure_running(self) -> bool:
        """Start the thread, if a gauge has a producer; where no thread can run, run them here.

        Returns whether a thread runs them.
        """
        if self._thread is not None:
            return True
        if self._stopped or not any(self._gauges()):
            return False
        if threads.can_run():
            if not self._starting.acquire(False):  # never released: one thread is enough
                return True
            thread = threads.NativeThread(self._run, "tapes-producers")
            try:
                thread.start()
            except RuntimeError:
                self._starting.release()
            else:
                self._thread = thread
                return True
        self._registry.refresh(_INTERVAL_SECONDS)
        return False

    def await_first(self) -> None:
        """Wait for producers that have not run yet, 0.5 s at most."""
        deadline = time.monotonic() + _FIRST_WAIT_SECONDS
        for _ in range(2):  # the first round to end may have begun without the newest producer
            if not any(gauge.awaits_producer for gauge in self._gauges()):
                return
            self._ran.clear()
            if self.ensure_running():
                self._signal()
                self._ran.wait(max(deadline - time.monotonic(), 0.0))

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread; return whether it has ended. A thread in a slow producer ends later."""
        self._stopped = True
        thread = self._thread
        if thread is None or thread.is_me():
            return True
        self._signal()
        return thread.join(timeout_seconds)

    def _gauges(self) -> list[Gauge]:
        return [gauge for gauge in self._registry.gauges() if gauge.has_producer]

    def _signal(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is released already
            self._wake.release()

    def _run(self) -> None:
        while not self._stopped:
            self._registry.refresh(_INTERVAL_SECONDS, is_read=False)
            self._ran.set()
            self._wake.acquire(timeout=_INTERVAL_SECONDS)
