"""Runs the producers of gauges, so that one that fails or hangs does not delay the others.

A round runs producers in helper threads, as a call that hangs can't be interrupted:

1. One helper takes gauges from a queue, in the context (`contextvars`) of the reader.
2. Every 0.1 s in which the queue does not become empty, another helper starts to take from it.
3. A producer that still runs after 1 s is *late*. The reader continues without it. It keeps its thread until
   it returns, and is not run again before that.
4. A producer that failed at once is run again in the reader's own thread, unless the second is over. Some
   producers work only there, such as one that counts the tasks of the running event loop.

The reader counts and logs failures and late producers, each of them once a round.

If gevent or eventlet has replaced threads, each producer runs in a greenlet of the reader's thread: one that
waits in another thread would leave an event loop there.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any

from tapes import threads
from tapes.errors import short_repr
from tapes.metrics import Gauge

_AT_ONCE_SECONDS = 0.01
"""Maximum seconds of a run that may have failed because of its thread."""
_STEP_SECONDS = 0.1
"""Seconds after which another helper starts if gauges still wait."""
_PATIENCE_SECONDS = 1.0
"""Maximum seconds that a round waits."""


def run_producers(gauges: Iterable[Gauge], max_age_seconds: float = 0.0, *, is_read: bool = True) -> None:
    """Run the producers of ``gauges`` whose values are older than ``max_age_seconds``; takes 1 s at most.

    Those without a producer are skipped, and so are those whose producer runs at the moment. If a reader
    waits in this thread (``is_read``), producers that failed are run again here.
    """
    due = [gauge for gauge in gauges if gauge.is_due(max_age_seconds)]
    if not due:
        return
    deadline = time.monotonic() + _PATIENCE_SECONDS
    one_round = _Round(due)
    if threads.is_patched():
        threads.in_greenlets([partial(one_round.run_one, gauge) for gauge in due], _PATIENCE_SECONDS)
        one_round.end()
    else:
        one_round.run(deadline)
    for gauge, failure, seconds in one_round.failed:
        error: BaseException | None = failure
        may_be_the_thread = isinstance(failure, Exception) and seconds < _AT_ONCE_SECONDS
        if is_read and may_be_the_thread and time.monotonic() < deadline:
            error = gauge.run_producer(Exception)  # any other is of a signal handler, and ends the read
        if error is not None:
            gauge.note_failure(f"its producer failed: {short_repr(error)}")


class _Round:
    """One run of each of ``gauges``."""

    def __init__(self, gauges: list[Gauge]) -> None:
        self.failed: list[tuple[Gauge, BaseException, float]] = []
        self._context = contextvars.copy_context()
        self._queue = deque(gauges)
        self._helpers: list[threads.NativeThread] = []
        self._unfinished = set(gauges)
        self._ended: Any = threads.unpatched("_thread", "allocate_lock")()
        self._ended.acquire()

    def run(self, deadline: float) -> None:
        while self._unfinished:
            if self._queue and not self._start_helper():
                self._run_here()
                break
            wait = min(_STEP_SECONDS, deadline - time.monotonic())
            if wait <= 0 or self._ended.acquire(timeout=wait):
                break
        self.end()

    def end(self) -> None:
        """Note which producers are late."""
        self._queue.clear()
        if not self._unfinished:  # a fork that follows meets no thread
            for helper in self._helpers:
                helper.join(_STEP_SECONDS)
        for gauge in list(self._unfinished):
            gauge.note_late(_PATIENCE_SECONDS)

    def _start_helper(self) -> bool:
        if not threads.can_run():
            return False
        context = self._context.copy()  # two threads can't be in one
        helper = threads.NativeThread(lambda: context.run(self._work), "tapes-producer")
        try:
            helper.start()
        except RuntimeError:
            return False
        self._helpers.append(helper)
        return True

    def _run_here(self) -> None:
        while self._queue:
            self.run_one(self._queue.popleft())
            if self.failed and isinstance(self.failed[-1][1], (KeyboardInterrupt, SystemExit)):
                raise self.failed[-1][1]  # most likely a signal handler's

    def _work(self) -> None:
        with contextlib.suppress(IndexError):  # the queue is empty
            while True:
                self.run_one(self._queue.popleft())

    def run_one(self, gauge: Gauge) -> None:
        """Run the producer of ``gauge``; never raises."""
        started = time.monotonic()
        error = gauge.run_producer(BaseException)
        if error is not None:
            self.failed.append((gauge, error, time.monotonic() - started))
        self._unfinished.discard(gauge)
        if not self._unfinished:
            with contextlib.suppress(RuntimeError):  # it was released already
                self._ended.release()
