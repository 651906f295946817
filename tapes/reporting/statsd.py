"""Metrics to StatsD, and to whatever else speaks its protocol.

Theory. StatsD adds up what it is sent, and forgets it when it is restarted. So of counts only what came since
the last report is sent (``c``), and everything else as a value that stands (``g``). What was told is kept
with the registry for each receiver, series by series, and moves on only when the packet with the difference
was sent; so nothing is told twice or lost when a send fails, or when one reporter is stopped and another one
started. When a series began is part of what is kept: one that began later is another, and all of it is new.

As StatsD adds up, each process tells the counts that it recorded itself, and an aggregator those of the whole
service. Gauges and distributions are told as they stand for the whole service by whoever tells them.

Source: the protocol is Etsy's StatsD (``docs/metric_types.md``), tags are Datadog's extension of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from tapes.errors import InvalidArgument, TapesError
from tapes.naming import Labels
from tapes.registry import Registry
from tapes.reporting.base import Reporter
from tapes.reporting.scheduled import ScheduledReporter
from tapes.reporting.transport import Transport
from tapes.snapshot import Snapshot
from tapes.sums import LARGE, Number

__all__ = ["SENDS_FAILED", "StatsdClient", "StatsdReporter"]

SENDS_FAILED = "tapes.statsd.failed"
"""The counter {reporter} of packets that could not be sent."""

_MILLISECONDS = frozenset({"min", "max", "mean", "stddev", "q50", "q75", "q95", "q98", "q99", "q999"})
_NOT_GAUGES = frozenset({"count", "sum"})

_WAIT_SECONDS = 1.0
_MAX_LINE_BYTES = 8000
_NOT_IN_NAMES, _NOT_IN_LEVELS = re.compile(r"[^a-zA-Z0-9_.-]"), re.compile(r"[^a-zA-Z0-9_-]")
_NOT_IN_TAGS = re.compile(r"[^!-~]|[,;|#]")

_Key = tuple[str, Labels]


class StatsdReporter(ScheduledReporter):
    """Reports to StatsD from a thread: at once, every interval, and a last time when it is stopped.

    =========  ====================================================================================
    counter    ``name``: what was added less what was taken away since the last report, as ``c``
    meter      ``name.count``: events since the last report, as ``c``; ``name.m1 m5 m15``, as ``g``
    histogram  ``name.count`` as ``c``; ``name.min max mean stddev q50 q75 q95 q98 q99 q999`` as ``g``
    timer      both, and its times in milliseconds
    gauge      ``name`` as ``g``; a negative value follows a 0, as a sign means a change
    =========  ====================================================================================

    Labels become levels of the name, before the field (``jobs.done.queue.mail.count``), or tags. Packets are
    filled to the MTU. What can't be sent is sent by the next report; failed sends are counted in
    ``tapes.statsd.failed``.

    In a connected worker it tells the counts of that worker, as StatsD adds them up; in an aggregator, those
    of the whole service.

    Args:
        interval: The time between reports; a ``timedelta``. StatsD's own is 10 s.
        host: The receiver's name or address, or ``unix:///PATH``.
        port: Its port.
        prefix: Put before every name, with a dot.
        registry: What to report; the default registry if ``None``.
        tags: Send labels as tags (``name:1|c|#queue:mail``), which Datadog's agent, Telegraf, StatsD 0.9 and
            statsd_exporter understand.
        protocol: ``"udp"`` or ``"tcp"``; of a unix socket they mean datagrams and a stream.

    Raises:
        InvalidArgument: If one of them is out of its range.
    """

    def __init__(
        self,
        interval: timedelta,
        host: str = "localhost",
        port: int = 8125,
        prefix: str | None = None,
        registry: Registry | None = None,
        *,
        tags: bool = False,
        protocol: str = "udp",
    ) -> None:
        super().__init__(interval, registry)
        self.client = StatsdClient(host, port, prefix, tags, protocol)

    def report(self) -> None:
        """Send all values once; raises `OSError` if something can't be sent."""
        self.client.send(self)

    def _release(self) -> None:
        self.client.close()


class _Told(NamedTuple):
    """What a receiver was told of a series.

    Attributes:
        value: What it counted less what was taken away.
        total: What it counted.
        before: How much of it was known to aggregators before this one, and not to be told.
        created: When it began; in an aggregator 0, as a series goes on that one of its workers removes.
    """

    value: Number
    total: Number
    before: Number
    created: float

    def since(self, last: _Told | None) -> Number:
        """Return what is to be told if ``last`` was told before, or nothing."""
        if last is None or self.created != last.created:
            return _less(self.value, self.before)
        known = _less(self.before, last.before)
        if _less(self.total, last.total) < known or self.total < last.total:
            return 0  # it was removed by a worker, or turned out to have been told before
        return _less(_less(self.value, last.value), known)


def _less(value: Number, other: Number) -> Number:
    """Return ``value - other``, also where a whole number is larger than any float."""
    try:
        return value - other
    except OverflowError:
        return int(value) - int(other)


class _Line(NamedTuple):
    """One value, or two lines that belong together; and what is told when it was sent."""

    text: bytes
    key: _Key | None = None
    told: _Told | None = None


class _Memory:
    """What a receiver was told of a registry; one report at a time reads and writes it."""

    def __init__(self) -> None:
        self.told: dict[_Key, _Told] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @contextlib.contextmanager
    def alone(self) -> Iterator[dict[_Key, _Told]]:
        if self._pid != os.getpid():  # forked: whoever held the lock is not here
            self._lock, self._pid = threading.Lock(), os.getpid()
        if not self._lock.acquire(timeout=_WAIT_SECONDS):
            raise TimeoutError("another report to the same receiver is under way")
        try:
            yield self.told
        finally:
            self._lock.release()


_memories: weakref.WeakKeyDictionary[Registry, dict[object, _Memory]] = weakref.WeakKeyDictionary()
"""By registry and receiver; a reporter that is made anew goes on where the last one was."""


class StatsdClient:
    """What StatsD reporters share: from a registry to packets, and what was told by them."""

    def __init__(self, host: str, port: int, prefix: str | None, tags: bool, protocol: str) -> None:
        if prefix is not None and not isinstance(prefix, str):
            raise InvalidArgument("a prefix", got=prefix, expected="a text like 'shop', or None")
        self._transport = Transport(host, port, protocol)
        prefix = (prefix or "").rstrip(".")
        self._prefix = prefix + "." if prefix else ""
        self._tags = tags
        self._receiver = (host, port, protocol, self._prefix, tags)

    def close(self) -> None:
        """Close the connection; the next report opens another."""
        self._transport.close()

    def send(self, reporter: Reporter) -> None:
        """Send what there is to tell of the reporter's registry.

        Raises:
            OSError: If something can't be sent; it stays to be told.
            AggregatorUnavailable: If gauges and distributions can't be known; counts are sent.
        """
        memories = _memories.setdefault(reporter.registry, {})
        with memories.setdefault(self._receiver, _Memory()).alone() as told:
            snapshot, failure = Snapshot([]), None
            try:
                snapshot = reporter.registry.snapshot()
            except TapesError as error:  # the service can't be asked: what this process counted can be told
                failure = error
            lines = self._short(reporter, self._lines(reporter.registry, snapshot, told))
            packets = list(self._packets(lines))
            for number, packet in enumerate(packets):
                try:
                    self._send(packet, told)
                except OSError:
                    reporter._count(SENDS_FAILED, len(packets) - number)
                    raise
            if failure is not None:
                raise failure

    def _send(self, lines: list[_Line], told: dict[_Key, _Told]) -> None:
        sent = self._transport.send([line.text for line in lines])
        for line in lines[:sent]:
            if line.key is not None and line.told is not None:
                told[line.key] = line.told
        if sent < len(lines):
            raise ConnectionError(f"the connection to {self._transport.address} broke")

    def _lines(self, registry: Registry, snapshot: Snapshot, told: dict[_Key, _Told]) -> Iterator[_Line]:
        counts = list(_counts(registry, snapshot))
        for key in told.keys() - {key for key, *_ in counts}:
            del told[key]  # it was removed
        for key, field, now in counts:
            difference = now.since(told.get(key))
            if difference:
                yield _Line(self._line(*key, field, difference, "c"), key, now)
            else:
                told[key] = now
        for family in snapshot:
            for series in family.series:
                for field, value in _standing(family.kind, series):
                    line = self._line(family.name, series.labels, field, value, "g")
                    signed = value < 0 or repr(value) == "-0.0"
                    zero = self._line(family.name, series.labels, field, 0, "g") + b"\n" if signed else b""
                    yield _Line(zero + line)

    def _line(self, name: str, labels: Labels, field: str, value: Number, kind: str) -> bytes:
        before, after = _parts(self._prefix + name, labels, self._tags)
        return f"{before}{field and '.'}{field}:{value!r}|{kind}{after}".encode()

    def _short(self, reporter: Reporter, lines: Iterable[_Line]) -> Iterator[_Line]:
        """Yield ``lines`` but those that no receiver would take, which would keep others from being told."""
        for line in lines:
            if len(line.text) <= _MAX_LINE_BYTES:
                yield line
            else:
                reporter._count(SENDS_FAILED)
                reporter._warn(f"a line of {len(line.text)} bytes is not sent ({line.text[:60]!r}…)")

    def _packets(self, lines: Iterable[_Line]) -> Iterator[list[_Line]]:
        """Yield ``lines`` in packets that are as full as they may be."""
        packet: list[_Line] = []
        size = 0
        for line in lines:
            if packet and size + len(line.text) + 1 > self._transport.most_bytes:
                yield packet
                packet, size = [], 0
            packet.append(line)
            size += len(line.text) + 1
        if packet:
            yield packet


def _counts(registry: Registry, snapshot: Snapshot) -> Iterator[tuple[_Key, str, _Told]]:
    """Yield what this process has to account for: a series, the field of its count, and what it stands at."""
    is_aggregator = registry.session.is_aggregator
    every: Iterable[tuple[str, str, Labels, Any]] = registry.collect()
    if is_aggregator:
        every = ((f.kind, f.name, *series) for f in snapshot for series in zip(f.labels, f.states))
    for kind, name, labels, state in every:
        if kind != "gauge":
            field, total = ("", state.up.value) if kind == "counter" else ("count", state.counted)
            origin = (state.origin.told, 0.0) if is_aggregator else (0, state.origin.created)
            yield (name, labels), field, _Told(state.counted, total, *origin)


def _standing(kind: str, series: Any) -> Iterator[tuple[str, Number]]:
    """Yield field and value of what is told as it stands."""
    if kind == "gauge":
        yield "", series.value
    elif kind != "counter":
        scale = 1000.0 if kind == "timer" else 1.0
        for field, value in series.fields().items():
            if field not in _NOT_GAUGES:
                yield field, min(value * scale, LARGE) if field in _MILLISECONDS else value


@lru_cache(maxsize=1 << 14)
def _parts(name: str, labels: Labels, tags: bool) -> tuple[str, str]:
    """Return what comes before the field, and after the value."""
    name = _NOT_IN_NAMES.sub("_", name)
    if not labels:
        return name, ""
    if tags:
        return name, "|#" + ",".join([f"{_tag(label)}:{_tag(value)}" for label, value in labels])
    return ".".join([name, *(_NOT_IN_LEVELS.sub("_", text) or "_" for label in labels for text in label)]), ""


def _tag(text: str) -> str:
    return _NOT_IN_TAGS.sub("_", text) or "_"
