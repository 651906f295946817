"""Load for one aggregator: a real one in a process of its own, and as many workers as are wanted.

Two cores can't run hundreds of workers, but what an aggregator does depends on what it receives alone. So a
worker here is an identity, a socket as a publisher has it, and messages made in advance from the states of a
real registry. Only its identity and the sequence numbers are written in before each is sent. They rise, so
the aggregator does all its work: it decodes, applies, and merges when it is read.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import zmq

import tapes
from tapes import forks, processes
from tapes.bins import bin_key, bin_value
from tapes.distributed.protocol.messages import Attach, Item, Read, Reply, Update
from tapes.distributed.protocol.wire import decode, encode
from tapes.distributed.transport.address import resolve
from tapes.distributed.transport.sockets import new_publisher, new_request_socket

__all__ = ["Aggregator", "Reader", "Shape", "Workers", "aggregator", "distribution", "series_of"]

STATES = 16
"""So many states of each kind are made; the series take turns with them, at another place in each worker."""
VARIANTS = 4
PER_NAME = 500
PATIENCE_SECONDS = 20.0

_IDENTITY = b"identity-of-load"
_SEQ, _BASE = 0x7A5A_6B7B_5C6C_7D03, 0x7A5A_6B7B_5C6C_7D02


class Shape(NamedTuple):
    """How many series there are of each kind, how many bins a distribution has, and how many labels each."""

    counters: int = 0
    histograms: int = 0
    timers: int = 0
    bins: int = 150
    labels: int = 1

    @property
    def series(self) -> int:
        return self.counters + self.histograms + self.timers

    @property
    def distributions(self) -> int:
        return self.histograms + self.timers

    @property
    def names(self) -> int:
        return sum(-(-count // PER_NAME) if self.labels else count for count in self[:3])


# The aggregator.


class Aggregator(NamedTuple):
    """One that listens at ``address``."""

    address: str
    pid: int

    def cpu(self) -> float:
        """Return the seconds of processor time that it has used, in all its threads."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def resident(self) -> int:
        pages = pathlib.Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def aggregator() -> Iterator[Aggregator]:
    """Start an aggregator as services do, and end it; it also ends with this process."""
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as directory:
        address = f"ipc://{directory}/s"
        code = (
            "import sys; from tapes.distributed.registry import RegistryAggregator as A; "
            f"a = A([], {address!r}); a.start(); print(flush=True); sys.stdin.readline(); a.stop()"
        )
        parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            parent.stdout.readline()  # type: ignore[union-attr]
            yield Aggregator(address, _last_descendant(parent.pid))
        finally:
            parent.communicate(b"\n", timeout=20)


def _last_descendant(pid: int) -> int:
    """Return the aggregator's pid: a process that only looks after it may be in between."""
    while children := pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


# Its workers.


def distribution(bins: int, seed: int) -> list[float]:
    """Return latencies that fall into just so many bins, with gaps between them as real ones have."""
    rng = random.Random(seed)
    first = bin_key(0.002)
    keys = rng.sample(range(first, first + 2 * bins), bins)
    values = [bin_value(key) for key in keys]
    return values + rng.choices(values, k=bins // 2)


def series_of(registry: tapes.Registry, kind: str, number: int, labels: int) -> Any:
    """Return a series of the ``number``-th name and labels."""
    values = {f"label{place}": f"/api/v1/{number % PER_NAME}" for place in range(labels)}
    name = f"shop.{kind}.{number // PER_NAME if labels else number}"
    return getattr(registry, kind)(name, **values)


def _items(shape: Shape, variant: int) -> list[Item]:
    registry = tapes.Registry(max_series=10 * PER_NAME)
    states: dict[str, list[Any]] = {"counter": [], "histogram": [], "timer": []}
    for kind, some in states.items():
        for number in range(STATES):
            metric = series_of(registry, kind, number, shape.labels)
            if kind == "counter":
                metric.increment(1000 * variant + number)
            for value in distribution(shape.bins, 100 * variant + number) if kind != "counter" else ():
                metric.update(value)
            some.append(metric.collect())
    items = []
    for kind, count in zip(states, shape):
        for number in range(count):
            metric = series_of(registry, kind, number, shape.labels)
            items.append(Item(kind, metric.name, metric.labels, states[kind][number % STATES]))
    return items


class _Template:
    """A message with places for the identity and the sequence numbers."""

    def __init__(self, items: list[Item], *, keyframe: bool) -> None:
        process, base = forks.this_process(), 0 if keyframe else _BASE
        data = encode(Update(_IDENTITY, process, processes.host_id(), _SEQ, base, items, {}))
        self._head, rest = data.split(_IDENTITY)
        self._middle, rest = rest.split(struct.pack(">Q", _SEQ))
        self._between, self._tail = (b"", rest) if keyframe else rest.split(struct.pack(">Q", _BASE))
        self._keyframe = keyframe
        self.size = len(data)

    def message(self, identity: bytes, seq: int, base: int) -> bytes:
        numbers = struct.pack(">Q", seq)
        if not self._keyframe:
            numbers += self._between + struct.pack(">Q", base)
        return b"".join((self._head, identity, self._middle, numbers, self._tail))


class _Worker:
    def __init__(self, context: zmq.Context[Any], address: str, variant: int) -> None:
        self.identity = os.urandom(16)
        self.variant = variant
        self.seq = 0
        self.socket = new_publisher(context, resolve(address))


class Workers:
    """So many workers of one aggregator, each with the series of ``shape``; it touches ``touched`` of it."""

    def __init__(self, address: str, count: int, shape: Shape, touched: Shape) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, count + 10)
        self._workers = [_Worker(self._context, address, number % VARIANTS) for number in range(count)]
        every = [_items(shape, variant) for variant in range(min(count, VARIANTS))]
        chosen = [_first_of(items, touched) for items in every]
        self._keyframes = [_Template(items, keyframe=True) for items in every]
        self._updates = [_Template(items, keyframe=False) for items in chosen]
        self.sent = self.last = 0
        self.message_bytes = self._updates[0].size
        deadline = time.monotonic() + PATIENCE_SECONDS
        for worker in self._workers:
            if not worker.socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                raise TimeoutError("the aggregator did not subscribe")

    def close(self) -> None:
        self._context.destroy(linger=0)

    def introduce(self, reader: Reader) -> None:
        """Have every worker send all its series, each when the one before was taken in: none has to queue."""
        for worker in self._workers:
            self._send(worker, self._keyframes[worker.variant])
            time.sleep(0.002)  # so that it is there before the question
            reader.await_turn()

    def publish(self, updates: int, per_second: float) -> float:
        """Have the workers publish in turns, evenly spread; return how many seconds that took."""
        began = time.monotonic()
        for number in range(updates):
            due = began + number / per_second
            time.sleep(max(0.0, due - time.monotonic()))
            worker = self._workers[number % len(self._workers)]
            self._send(worker, self._updates[worker.variant])
        self.last = updates
        time.sleep(max(0.0, began + updates / per_second - time.monotonic()))
        return time.monotonic() - began

    def _send(self, worker: _Worker, template: _Template) -> None:
        """Send a message; a queue that is full is waited for, as publishers do."""
        base, worker.seq = worker.seq, max(worker.seq + 1, forks.now_ns())
        worker.socket.send(template.message(worker.identity, worker.seq, base))
        self.sent += 1


class Reader:
    """Asks the aggregator as a worker does, with more patience."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = new_request_socket(self._context, resolve(address))
        self._identity = os.urandom(16)
        self.asked = 0

    def close(self) -> None:
        self._context.destroy(linger=0)

    def read(self) -> bytes:
        """Return everything, written for Prometheus."""
        update = Update(self._identity, forks.this_process(), processes.host_id(), forks.now_ns(), 0, [], {})
        return self._ask(Read(1, "prometheus", update))

    def await_turn(self) -> None:
        """Wait until the aggregator has taken in what workers published: it answers nobody before."""
        self._ask(Attach(1, processes.host_id(), ()))

    def _ask(self, question: Read | Attach) -> bytes:
        self.asked += 1
        self._socket.send(encode(question))
        if not self._socket.poll(int(PATIENCE_SECONDS * 1000)):
            raise TimeoutError("the aggregator did not answer")
        reply = decode(self._socket.recv())
        assert isinstance(reply, Reply), reply
        assert reply.status == "ok", reply
        return reply.payload

    def messages(self) -> int:
        """Return how many messages the aggregator has received."""
        return int(re.search(rb"^tapes_messages_total (\d+)", self.read(), re.M)[1])  # type: ignore[index]


def _first_of(items: list[Item], touched: Shape) -> list[Item]:
    left = dict(zip(("counter", "histogram", "timer"), touched))
    chosen = []
    for item in items:
        if left[item.kind]:
            left[item.kind] -= 1
            chosen.append(item)
    return chosen
