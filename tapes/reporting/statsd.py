"""Metrics to StatsD, and to other receivers of its protocol.

Theory. StatsD adds up the counts that it is sent, and forgets them when it restarts. So a report has only
what each count has grown since the last one (``c``), and the current value of everything else (``g``). A
cursor keeps what was sent (`.cursor`): in the process, for each registry and receiver, so that a new reporter
goes on where the last one stopped; in an aggregator also in its journal. If a series began later than the one
in the cursor, it is another series, and all of it is new.

As StatsD adds up, each process sends the counts that it recorded itself, and an aggregator those of the whole
service. Gauges and distributions are always those of the whole service.

Source: the protocol is Etsy's StatsD (``docs/metric_types.md``), tags are Datadog's extension of it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple, cast

from tapes.errors import InvalidArgument, TapesError
from tapes.naming import Labels
from tapes.registry import Registry
from tapes.reporting.base import Reporter
from tapes.reporting.cursor import Cursor, Sent, Series, Unsaved
from tapes.reporting.scheduled import ScheduledReporter
from tapes.reporting.transport import Transport
from tapes.snapshot import Snapshot
from tapes.sums import LARGE, Number

__all__ = ["SENDS_FAILED", "StatsdClient", "StatsdReporter"]

SENDS_FAILED = "tapes.statsd.failed"  # the counter {reporter} of packets that could not be sent

_MILLISECONDS = frozenset({"min", "max", "mean", "stddev", "q50", "q75", "q95", "q98", "q99", "q999"})
_NOT_GAUGES = frozenset({"count", "sum"})

_MAX_LINE_BYTES = 8000
_NOT_IN_NAMES, _NOT_IN_LEVELS = re.compile(r"[^a-zA-Z0-9_.-]"), re.compile(r"[^a-zA-Z0-9_-]")
_NOT_IN_TAGS = re.compile(r"[^!-~]|[,;|#]")


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
    filled to the MTU. Counts that can't be sent are sent by the next report; failed sends are counted in
    ``tapes.statsd.failed``.

    In a connected worker it reports the counts of that worker, as StatsD adds them up; in an aggregator,
    those of the whole service.

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


class _Line(NamedTuple):
    """One value, or two lines that belong together; and the count that is sent with it."""

    text: bytes
    series: Series | None = None
    sent: Sent | None = None


_cursors: weakref.WeakKeyDictionary[Registry, dict[str, Cursor]] = weakref.WeakKeyDictionary()
"""By registry and receiver; a new reporter goes on where the last one stopped."""


class StatsdClient:
    """From a registry to packets; shared by the StatsD reporters."""

    def __init__(self, host: str, port: int, prefix: str | None, tags: bool, protocol: str) -> None:
        if prefix is not None and not isinstance(prefix, str):
            raise InvalidArgument("a prefix", got=prefix, expected="a text like 'shop', or None")
        self._transport = Transport(host, port, protocol)
        prefix = (prefix or "").rstrip(".")
        self._prefix = prefix + "." if prefix else ""
        self._tags = tags
        self._target = f"statsd {protocol} {host} {port} {self._prefix} {tags}"

    def close(self) -> None:
        """Close the connection; the next report opens another."""
        self._transport.close()

    def send(self, reporter: Reporter) -> None:
        """Report the reporter's registry.

        Raises `OSError` if something can't be sent, which the next report sends; `AggregatorUnavailable` if
        gauges and distributions can't be known, though counts are sent.
        """
        registry = reporter.registry
        cursor = self._cursor(registry)
        with cursor.alone() as sent:
            may_lag = cursor.may_lag()  # of the snapshot, so it is read before
            snapshot = Snapshot([])
            failure: Exception | None = None
            try:
                snapshot = registry.snapshot()
            except TapesError as error:  # the counts of this process are known without the aggregator
                failure = error
            counts = dict(_counts(registry, snapshot))
            if cursor.skips_history:
                cursor.move({series: count for series, (_, count) in counts.items()})
                cursor.skips_history = False
            lines = [*self._differences(counts, cursor, sent, may_lag), *self._current_values(snapshot)]
            packets = list(self._packets(self._short(reporter, lines)))
            for number, packet in enumerate(packets):
                try:
                    self._send(packet, cursor, sent)
                except Unsaved as error:  # everything but the counts is sent
                    failure = error
                    self._send([line for line in packet if line.series is None], cursor, sent)
                except OSError:
                    reporter._count(SENDS_FAILED, len(packets) - number)
                    raise
            if failure is not None:
                raise failure

    def _cursor(self, registry: Registry) -> Cursor:
        session: Any = registry.session
        if session.is_aggregator:
            return cast("Cursor", session.cursor(self._target))
        return _cursors.setdefault(registry, {}).setdefault(self._target, Cursor())

    def _send(self, lines: list[_Line], cursor: Cursor, sent: Mapping[Series, Sent]) -> None:
        """Send a packet; the cursor moves first, and back over the lines that could not be sent."""
        moves = {line.series: line.sent for line in lines if line.series is not None}
        before = {series: sent.get(series) for series in moves}
        if moves:
            cursor.move(moves)
        done = 0
        try:
            done = self._transport.send([line.text for line in lines]) if lines else 0
        finally:
            failed = [line.series for line in lines[done:] if line.series is not None]
            if failed:
                cursor.move_back({series: before[series] for series in failed})
        if done < len(lines):
            raise ConnectionError(f"the connection to {self._transport.address} broke")

    def _differences(
        self,
        counts: dict[Series, tuple[str, Sent]],
        cursor: Cursor,
        sent: Mapping[Series, Sent],
        may_lag: bool,
    ) -> list[_Line]:
        """Return what counts have grown since the last report; the cursor follows those that have not."""
        removed = () if may_lag else sent.keys() - counts.keys()
        skipped: dict[Series, Sent | None] = dict.fromkeys(removed)
        lines = []
        for series, (field, count) in counts.items():
            last = sent.get(series)
            if last is not None and count.is_behind(last):
                if not may_lag:
                    skipped[series] = count
            elif difference := count.since(last):
                lines.append(_Line(self._line(*series, field, difference, "c"), series, count))
            else:
                skipped[series] = count
        cursor.skip(skipped)
        return lines

    def _current_values(self, snapshot: Snapshot) -> Iterator[_Line]:
        for family in snapshot:
            for series in family.series:
                for field, value in _gauge_fields(family.kind, series):
                    line = self._line(family.name, series.labels, field, value, "g")
                    signed = value < 0 or repr(value) == "-0.0"
                    zero = self._line(family.name, series.labels, field, 0, "g") + b"\n" if signed else b""
                    yield _Line(zero + line)

    def _line(self, name: str, labels: Labels, field: str, value: Number, kind: str) -> bytes:
        before, after = _parts(self._prefix + name, labels, self._tags)
        return f"{before}{field and '.'}{field}:{value!r}|{kind}{after}".encode()

    def _short(self, reporter: Reporter, lines: Iterable[_Line]) -> Iterator[_Line]:
        """Yield ``lines`` without those that no receiver would take; they would hold up the others."""
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
            if packet and size + len(line.text) + 1 > self._transport.max_bytes:
                yield packet
                packet, size = [], 0
            packet.append(line)
            size += len(line.text) + 1
        if packet:
            yield packet


def _counts(registry: Registry, snapshot: Snapshot) -> Iterator[tuple[Series, tuple[str, Sent]]]:
    """Yield the counts that this process reports: a series, and the field and the value of its count."""
    is_aggregator = registry.session.is_aggregator
    every: Iterable[tuple[str, str, Labels, Any]] = registry.collect()
    if is_aggregator:
        every = ((f.kind, f.name, *series) for f in snapshot for series in zip(f.labels, f.states))
    for kind, name, labels, state in every:
        if kind != "gauge":
            field, total = ("", state.up.value) if kind == "counter" else ("count", state.counted)
            baseline, created = (state.origin.baseline, 0.0) if is_aggregator else (0, state.origin.created)
            yield (name, labels), (field, Sent(state.counted, total, baseline, created))


def _gauge_fields(kind: str, series: Any) -> Iterator[tuple[str, Number]]:
    """Yield field and value of what is sent as a gauge."""
    if kind == "gauge":
        yield "", series.value
    elif kind != "counter":
        scale = 1000.0 if kind == "timer" else 1.0
        for field, value in series.fields().items():
            if field not in _NOT_GAUGES:
                yield field, min(value * scale, LARGE) if field in _MILLISECONDS else value


@lru_cache(maxsize=1 << 14)
def _parts(name: str, labels: Labels, tags: bool) -> tuple[str, str]:
    """Return the parts of a line before the field and after the value."""
    name = _NOT_IN_NAMES.sub("_", name)
    if not labels:
        return name, ""
    if tags:
        return name, "|#" + ",".join([f"{_tag(label)}:{_tag(value)}" for label, value in labels])
    return ".".join([name, *(_NOT_IN_LEVELS.sub("_", text) or "_" for label in labels for text in label)]), ""


def _tag(text: str) -> str:
    return _NOT_IN_TAGS.sub("_", text) or "_"
