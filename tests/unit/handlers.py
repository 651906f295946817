"""Handlers of aggregators without sockets, and workers that send them bytes."""

from __future__ import annotations

import os

import pytest

import tapes
from tapes import forks, processes
from tapes.clock import monotonic
from tapes.distributed.aggregator.answers import Question
from tapes.distributed.protocol.messages import Goodbye, Item, Read, Reply, Update
from tapes.distributed.protocol.wire import encode
from tapes.processes import Process

DEAD_PROCESS = Process(1 << 22, 1)


class Worker:
    """A worker's messages, in bytes."""

    def __init__(self, process=None, host=None, **options):
        self.registry = tapes.Registry(**options)
        self.identity = os.urandom(16)
        self.process = process or forks.this_process()
        self.host = host or processes.host_id()

    def update(self):
        items = [Item(*series) for series in self.registry.collect()]
        return Update(self.identity, self.process, self.host, forks.now_ns(), 0, items, {})

    def publication(self):
        return encode(self.update())

    def goodbye(self):
        return encode(Goodbye(7, self.update()))

    def read(self):
        return encode(Read(5, "states", self.update()))


def crash(keeper):
    """End it as if it were killed."""
    keeper.journal.close()


def successor(first, books):
    """Kill ``first``; return its successor, which has read its journal."""
    crash(first)
    second = books()
    second.restore()
    return second


def answered(keeper, question):
    """Return what is sent as the answer to ``question``."""
    answer = keeper.answer(question)
    if isinstance(answer, Question):
        answer = encode(Reply(answer.correlation, *keeper.render(answer.what)))
    return answer


def of_version(version, message):
    """Return a message as a release of that version of the wire sends it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tapes.distributed.protocol.wire.VERSION", version)
        return encode(message)


def values(keeper, *names):
    snapshot = keeper.registry.snapshot()
    found = [snapshot.get(name) for name in names]
    return [None if series is None else series.value for series in found]


def write(keeper):
    while keeper.journal.step(monotonic() + 100):
        pass
