"""Values that are recorded during and after the goodbye."""

from __future__ import annotations

import tapes
from tapes import threads
from tapes.distributed.worker.late_flush import LateSession
from tapes.session import Session


def test_the_goodbye_may_wait_for_a_thread_of_tapes_that_records():
    """What the publisher records while it ends is flushed after the goodbye, without a deadlock."""
    registry = tapes.Registry()
    counter = registry.counter("c")
    ended, handed_over = [], []
    late = LateSession(registry, None, lambda: handed_over.append(counter.collect().counted))

    class Connected(Session):
        def woken(self):
            return late.woken()

        def close(self):
            publisher = threads.NativeThread(counter.increment, "publisher")
            publisher.start()
            ended.append(publisher.join(5))

    late.begin(Connected(registry))
    assert ended == [True]
    assert handed_over == [1]
    counter.increment()
    assert handed_over == [1, 2]


def test_a_read_during_the_goodbye_is_answered_by_the_session_that_closes():
    """It may fail, but it does not answer for one process, and does not connect anew."""
    registry, answers = tapes.Registry(), []

    class Closing(Session):
        def snapshot(self):
            return "closing"

        def close(self):
            answers.append(registry.snapshot())

    LateSession(registry, lambda: answers.append("connected"), lambda: None).begin(Closing(registry))
    assert answers == ["closing"]
