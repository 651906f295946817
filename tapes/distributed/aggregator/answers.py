"""Answers to reads, rendered in a thread of their own, so that the aggregator's loop goes on.

Rendering takes from a millisecond to half a second. One answer serves all questions for one form that wait
when it is begun, as the loop had entered their updates before. Questions whose readers have timed out are
dropped. While a long answer is rendered, the loop sends each reader a `WAIT` now and then, which extends its
timeout.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tapes.clock import monotonic
from tapes.distributed.protocol.messages import WAIT, Reply
from tapes.distributed.protocol.wire import encode
from tapes.distributed.transport.requests import MAX_WAIT_SECONDS, TIMEOUT_SECONDS
from tapes.threads import NativeThread, can_run, unpatched

_SIGN_SECONDS = TIMEOUT_SECONDS / 3
"""Seconds between two `WAIT` replies."""


class Question(NamedTuple):
    """A read that was entered and waits for its answer; with the fields of a `Read`."""

    what: str
    correlation: int


class _Waiting(NamedTuple):
    route: list[bytes]
    question: Question
    deadline: float


class Answers:
    """Renders answers, and calls ``wake`` when there are some; `put` and `ready` belong to the loop."""

    def __init__(self, render: Callable[[str], tuple[str, bytes]], wake: Callable[[], None]) -> None:
        self._render = render
        self._wake = wake
        self._waiting: deque[_Waiting] = deque()
        self._rendering: list[_Waiting] = []
        self._ready: deque[tuple[list[bytes], bytes]] = deque()
        self._sign_due = 0.0
        self._is_stopped = False
        self._thread: NativeThread | None = None
        self._something_waits = unpatched("_thread", "allocate_lock")()
        self._something_waits.acquire()

    def put(self, route: list[bytes], question: Question) -> None:
        self._waiting.append(_Waiting(route, question, monotonic() + MAX_WAIT_SECONDS))
        if self._thread is None and can_run():
            thread = NativeThread(self._run, "tapes-answers")
            with contextlib.suppress(RuntimeError):  # no thread can be started: the loop renders
                thread.start()
                self._thread = thread
        if self._thread is None:
            self._answer_next()
        elif self._something_waits.locked():
            self._something_waits.release()

    def ready(self) -> Iterator[tuple[list[bytes], bytes]]:
        """Yield the replies that are to be sent, each with its route."""
        if self._rendering and monotonic() > self._sign_due:
            self._sign_due = monotonic() + _SIGN_SECONDS
            for route, question, _ in [*self._rendering, *self._waiting.copy()]:
                yield route, encode(Reply(question.correlation, WAIT, b""))
        while self._ready:
            yield self._ready.popleft()

    def stop(self) -> None:
        self._is_stopped = True
        if self._thread is not None:
            if self._something_waits.locked():
                self._something_waits.release()
            self._thread.join(TIMEOUT_SECONDS)

    def _run(self) -> None:
        while not self._is_stopped:
            self._something_waits.acquire()
            while self._waiting and not self._is_stopped:
                self._answer_next()

    def _answer_next(self) -> None:
        """Answer the question that has waited longest, and all others for the same form."""
        now = monotonic()
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        alive = [one for one in waiting if one.deadline > now]
        if not alive:
            return
        what = alive[0].question.what
        same = [one for one in alive if one.question.what == what]
        self._waiting.extendleft(reversed([one for one in alive if one.question.what != what]))
        self._sign_due = now + _SIGN_SECONDS
        self._rendering = same
        status, payload = self._render(what)
        for route, question, _ in same:
            self._ready.append((route, _encoded(question, status, payload)))
        self._rendering = []
        self._wake()


def _encoded(question: Question, status: str, payload: bytes) -> bytes:
    try:
        return encode(Reply(question.correlation, status, payload))
    except MemoryError:
        return encode(Reply(question.correlation, "error", b"there is no memory for the answer"))
