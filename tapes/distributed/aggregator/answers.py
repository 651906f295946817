"""Answers to readers, made in a thread of their own: the aggregator's loop goes on meanwhile.

Making one takes from a millisecond to half a second. One answer serves all questions of one form that wait
when it is begun: the loop had entered their updates before. Questions whose readers have given up are
dropped. While a long one is made, the loop sends all readers a `WAIT` now and then, and they wait on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tapes.clock import monotonic
from tapes.distributed.protocol.messages import WAIT, Reply
from tapes.distributed.protocol.wire import VERSION, encode
from tapes.distributed.transport.requests import MAX_WAIT_SECONDS, TIMEOUT_SECONDS
from tapes.threads import NativeThread, can_run, unpatched

__all__ = ["Answers", "Wanted"]


_SIGN_SECONDS = TIMEOUT_SECONDS / 3
"""Seconds between two signs that an answer is being made."""


class Wanted(NamedTuple):
    """What a reader waits for.

    Attributes:
        what: As `tapes.distributed.protocol.messages.Read`.
        version: The version of the wire in which it is answered.
        correlation: The number of the question.
    """

    what: str
    version: int
    correlation: int


class _Question(NamedTuple):
    route: list[bytes]
    wanted: Wanted
    deadline: float


class Answers:
    """Makes answers; `put` and `made` belong to the loop.

    Args:
        make: Returns the status and the payload of an answer, given what is wanted and the version.
        wake: Called when there are answers to be sent.
    """

    def __init__(self, make: Callable[[str, int], tuple[str, bytes]], wake: Callable[[], None]) -> None:
        self._make = make
        self._wake = wake
        self._waiting: deque[_Question] = deque()
        self._made: deque[tuple[list[bytes], bytes]] = deque()
        self._making: list[_Question] = []
        self._sign_due = 0.0
        self._is_stopped = False
        self._thread: NativeThread | None = None
        self._something_waits = unpatched("_thread", "allocate_lock")()
        self._something_waits.acquire()

    def put(self, route: list[bytes], wanted: Wanted) -> None:
        """Note a question that has just come."""
        patience = MAX_WAIT_SECONDS if wanted.version == VERSION else TIMEOUT_SECONDS
        self._waiting.append(_Question(route, wanted, monotonic() + patience))
        if self._thread is None and can_run():
            thread = NativeThread(self._run, "tapes-answers")
            try:
                thread.start()
            except RuntimeError:  # no thread can be started: the loop waits for the answer
                pass
            else:
                self._thread = thread
        if self._thread is None:
            self._answer_next()
        elif self._something_waits.locked():
            self._something_waits.release()

    def made(self) -> Iterator[tuple[list[bytes], bytes]]:
        """Yield the answers that are to be sent, each with its route."""
        if self._making and monotonic() > self._sign_due:
            self._sign_due = monotonic() + _SIGN_SECONDS
            for route, (_, version, correlation), _ in [*self._making, *self._waiting.copy()]:
                if version == VERSION:  # an earlier release knows no such reply
                    yield route, encode(Reply(correlation, WAIT, b""))
        while self._made:
            yield self._made.popleft()

    def stop(self) -> None:
        """End the thread, when it has made what it is making."""
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
        """Answer the question that has waited longest, and all that want the same."""
        now = monotonic()
        questions = [self._waiting.popleft() for _ in range(len(self._waiting))]
        alive = [question for question in questions if question.deadline > now]
        if not alive:
            return
        what, version, _ = alive[0].wanted
        same = [question for question in alive if question.wanted[:2] == (what, version)]
        others = [question for question in alive if question.wanted[:2] != (what, version)]
        self._waiting.extendleft(reversed(others))
        self._sign_due = now + _SIGN_SECONDS
        self._making = same
        status, payload = self._make(what, version)
        for question in same:
            self._made.append((question.route, _encoded(question.wanted, status, payload)))
        self._making = []
        self._wake()


def _encoded(wanted: Wanted, status: str, payload: bytes) -> bytes:
    try:
        return encode(Reply(wanted.correlation, status, payload), wanted.version)
    except MemoryError:
        return encode(
            Reply(wanted.correlation, "error", b"there is no memory for the answer"), wanted.version
        )
