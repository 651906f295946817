"""What a reader sees: one consistent, frozen cut of a registry.

A snapshot is a mapping of names to families, a family is the series of one name, and a series carries its
labels and its values. Reporters and expositions see nothing else, so they need not know whether the numbers
come from one process or from fifty.

Times are in seconds, rates in events per second.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import inf, isfinite
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import addict

from tapes.distribution import Distribution
from tapes.errors import InvalidArgument
from tapes.naming import Labels, canonical_labels, selector
from tapes.sums import Number

__all__ = [
    "FIELDS",
    "CounterSeries",
    "Description",
    "Family",
    "GaugeSeries",
    "HistogramSeries",
    "MeterSeries",
    "Series",
    "Snapshot",
    "Stats",
    "TimerSeries",
]

_log = logging.getLogger("tapes.snapshot")

if TYPE_CHECKING:  # addict has no types

    class Stats(dict[str, Any]):
        """What ``get_stats()`` returns: an `addict.Dict`, whose items are attributes too; frozen."""

        def __getattr__(self, name: str) -> Any: ...
else:
    Stats = addict.Dict

_MAX_BUCKETS = 1000

_QUANTILES = (
    ("q50", 0.5), ("q75", 0.75), ("q95", 0.95), ("q98", 0.98), ("q99", 0.99), ("q999", 0.999),
)  # fmt: skip


class CounterSeries(NamedTuple):
    """A counter: ``value`` is what was added less what was taken away.

    Attributes:
        total: What was added; never falls.
        decremented: Whether anything was ever taken away.
        created: When it began to count, in seconds since 1970; of several processes the first.
    """

    labels: Labels
    value: Number
    total: Number
    decremented: bool
    created: float = inf

    def fields(self) -> dict[str, Number]:
        """Return what ``get_stats()`` shows."""
        return {"value": self.value}


class GaugeSeries(NamedTuple):
    """A gauge: its value now, merged as its mode says."""

    labels: Labels
    value: Number

    def fields(self) -> dict[str, Number]:
        """Return what ``get_stats()`` shows."""
        return {"value": self.value}


class MeterSeries(NamedTuple):
    """A meter: how many events, and at which rate over the last 1, 5 and 15 minutes."""

    labels: Labels
    count: Number  # type: ignore[assignment]  # shadows tuple.count, on purpose
    m1: float
    m5: float
    m15: float
    created: float = inf

    def fields(self) -> dict[str, Number]:
        """Return what ``get_stats()`` shows."""
        return {"count": self.count, "m1": self.m1, "m5": self.m5, "m15": self.m15}


class HistogramSeries(NamedTuple):
    """A distribution: ``lifetime`` since the start, ``recent`` over about the last five minutes."""

    labels: Labels
    lifetime: Distribution
    recent: Distribution
    created: float = inf

    @property
    def count(self) -> Number:  # type: ignore[override]  # likewise
        """How many values there were since the start."""
        return self.lifetime.count

    @property
    def sum(self) -> float:
        """The exact sum of all values since the start."""
        return self.lifetime.sum

    def fields(self) -> dict[str, Number]:
        """Return what ``get_stats()`` shows: count and sum since the start, the rest recent."""
        return _distribution_fields(self.lifetime, self.recent)


class TimerSeries(NamedTuple):
    """A meter of events and the distribution of their durations in seconds."""

    labels: Labels
    m1: float
    m5: float
    m15: float
    lifetime: Distribution
    recent: Distribution
    created: float = inf

    @property
    def count(self) -> Number:  # type: ignore[override]  # likewise
        """How many durations there were since the start."""
        return self.lifetime.count

    @property
    def sum(self) -> float:
        """The exact sum of all durations since the start, in seconds."""
        return self.lifetime.sum

    def fields(self) -> dict[str, Number]:
        """Return what ``get_stats()`` shows: count and sum since the start, the rest recent."""
        rates = {"m1": self.m1, "m5": self.m5, "m15": self.m15}
        return {**_distribution_fields(self.lifetime, self.recent), **rates}


Series = CounterSeries | GaugeSeries | MeterSeries | HistogramSeries | TimerSeries

_RATES = {"count", "m1", "m5", "m15"}
_DISTRIBUTION = {"count", "sum", "min", "max", "mean", "stddev", *(name for name, _ in _QUANTILES)}

FIELDS: Mapping[str, frozenset[str]] = {
    "counter": frozenset({"value"}),
    "gauge": frozenset({"value"}),
    "meter": frozenset(_RATES),
    "histogram": frozenset(_DISTRIBUTION),
    "timer": frozenset(_DISTRIBUTION | _RATES),
}
"""Kind to the names of the fields that ``get_stats()`` shows for it."""


def _distribution_fields(lifetime: Distribution, recent: Distribution) -> dict[str, Number]:
    fields: dict[str, Number] = {
        "count": lifetime.count,
        "sum": lifetime.sum,
        "min": recent.min,
        "max": recent.max,
        "mean": recent.mean,
        "stddev": recent.stddev,
    }
    for name, q in _QUANTILES:
        fields[name] = recent.quantile(q)
    return fields


@lru_cache(maxsize=256)
def _log_hidden(name: str) -> None:
    """Log, once for each name, that it has no place in the tree."""
    _log.warning("%r is not in the tree: another worker's metric above it has a field of that name", name)


class _State(Protocol):
    def series(self, labels: Labels, tick: int) -> Series | None: ...


class Description(NamedTuple):
    """What ``describe()`` says of a metric.

    Attributes:
        text: What it means; empty where nothing was said.
        unit: The unit of its values, or ``None``; always ``"seconds"`` for timers.
        buckets: The upper bounds of its buckets where it is exposed as such; empty for the usual ones.
    """

    text: str = ""
    unit: str | None = None
    buckets: tuple[float, ...] = ()

    @classmethod
    def checked(cls, text: str, unit: str | None, buckets: Sequence[float]) -> Description:
        """Return one of these; raises `InvalidArgument` for what can't be one."""
        if not isinstance(text, str) or not (unit is None or isinstance(unit, str)):
            raise InvalidArgument(
                "describe()", got=(text, unit), expected="a sentence, and a unit like 'bytes' or None"
            )
        try:
            bounds = tuple(map(float, buckets))
            valid = all(map(isfinite, bounds)) and sorted(set(bounds)) == list(bounds)
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid or len(bounds) > _MAX_BUCKETS:
            raise InvalidArgument(
                "the buckets of describe()",
                got=buckets,
                expected=f"finite upper bounds in ascending order, {_MAX_BUCKETS} at most",
                remedy="leave +Inf out, it is always there",
            )
        return cls(text, unit, bounds)


class Family:
    """All series of one name, frozen.

    For who needs a few numbers of very many series, ``labels`` and ``states`` are what these are made of, in
    any order, and ``tick`` what they are as of.

    Attributes:
        kind: ``"counter"``, ``"gauge"``, ``"meter"``, ``"histogram"`` or ``"timer"``.
        text, unit, buckets: As `Description`.
    """

    __slots__ = ("_series", "buckets", "kind", "labels", "name", "states", "text", "tick", "unit")

    def __init__(
        self,
        name: str,
        kind: str,
        described: Description | None,
        labels: Sequence[Labels],
        states: Sequence[_State],
        tick: int,
    ) -> None:
        self.name = name
        self.kind = kind
        self.text, unit, self.buckets = described or Description()
        self.unit = "seconds" if kind == "timer" else unit
        self.labels = labels
        self.states = states
        self.tick = tick
        self._series: tuple[Series, ...] | None = None

    def __repr__(self) -> str:
        return f"<tapes family {self.name!r}: {self.kind}, {len(self.states)} series>"

    @property
    def series(self) -> tuple[Series, ...]:
        """What there is to see of each, sorted by labels; put together when first asked for."""
        series = self._series
        if series is None:
            states = sorted(zip(self.labels, self.states), key=itemgetter(0))
            shown = (state.series(labels, self.tick) for labels, state in states)
            series = self._series = tuple(one for one in shown if one is not None)
        return series


class Snapshot:
    """One consistent, frozen cut of a registry; iterating yields its families sorted by name.

    Args:
        families: In any order.
        memory: Where readers keep what spares them work with the next snapshot of the same source, each
            under a key of its own: what is true of names and labels, never numbers. A source hands the same
            one to all its snapshots; so what is kept is replaced as a whole, as several threads may read.
    """

    __slots__ = ("_families", "memory")

    def __init__(self, families: Iterable[Family], memory: dict[str, Any] | None = None) -> None:
        self._families = {family.name: family for family in sorted(families, key=lambda family: family.name)}
        self.memory = {} if memory is None else memory

    def __iter__(self) -> Iterator[Family]:
        return iter(self._families.values())

    def __len__(self) -> int:
        return len(self._families)

    def family(self, name: str) -> Family | None:
        """Return all of one name, or ``None`` if there is no such metric."""
        return self._families.get(name)

    def series(self, name: str) -> tuple[Series, ...]:
        """Return every series of ``name``; empty if there is no such metric."""
        family = self._families.get(name)
        return family.series if family else ()

    def get(self, name: str, *, labels: Mapping[str, Any] | None = None, **more_labels: Any) -> Any | None:
        """Return the series of ``name`` with exactly these labels, or ``None``.

        The result is one of the ``…Series`` classes of this module, according to the metric's kind.
        """
        wanted = canonical_labels(labels, more_labels)
        return next((series for series in self.series(name) if series.labels == wanted), None)

    def stats(self) -> Stats:
        """Return all values as a frozen tree of dicts, nested on the dots of the names.

        A labelled series hangs below its name under its selector: ``tree.jobs.done['{queue="mail"}']``.
        """
        tree = Stats(self.tree())
        tree.freeze()
        return tree

    def tree(self) -> dict[str, Any]:
        """Return what `stats` does as plain dicts, for those who write it."""
        tree: dict[str, Any] = {}
        for family in self:
            if not family.series:
                continue
            node: Any = tree
            for segment in family.name.split("."):
                node = node.setdefault(segment, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                _log_hidden(family.name)  # only workers that disagree on names can come here
                continue
            for series in family.series:
                if series.labels:
                    node.setdefault(selector(series.labels), {}).update(series.fields())
                else:
                    node.update(series.fields())
        return tree
