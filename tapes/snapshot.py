"""Snapshots: consistent, frozen cuts of a registry.

A snapshot maps names to families, a family is the series of one name, and a series has its labels and its
values. Reporters and expositions use nothing else, so they do not depend on whether the numbers come from one
process or from fifty.

Times are in seconds, rates in events per second.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import addict

from tapes.distribution import Distribution
from tapes.errors import InvalidArgument
from tapes.naming import Labels, canonical_labels, selector
from tapes.once import OnceLogger
from tapes.sums import Number

__all__ = [
    "FIELDS", "CounterSeries", "Description", "Family", "GaugeSeries", "HistogramSeries", "MeterSeries",
    "Series", "Snapshot", "Stats", "TimerSeries",
]  # fmt: skip

_once = OnceLogger(logging.getLogger("tapes.snapshot"))

if TYPE_CHECKING:  # addict has no types

    class Stats(dict[str, Any]):
        """The result of ``get_stats()``: a frozen `addict.Dict`, whose items are attributes too."""

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
        created: When it began to count, in seconds since 1970; the earliest time of several processes.
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
    """A gauge: its value now, merged by its mode."""

    labels: Labels
    value: Number

    def fields(self) -> dict[str, Number]:
        """Return what ``get_stats()`` shows."""
        return {"value": self.value}


class MeterSeries(NamedTuple):
    """A meter: the number of events, and their rates over the last 1, 5 and 15 minutes."""

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
        """The number of values since the start."""
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
        """The number of durations since the start."""
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
    "counter": frozenset({"value"}), "gauge": frozenset({"value"}), "meter": frozenset(_RATES),
    "histogram": frozenset(_DISTRIBUTION), "timer": frozenset(_DISTRIBUTION | _RATES),
}  # fmt: skip
"""Kind to the names of the fields that ``get_stats()`` shows for it."""


def _distribution_fields(lifetime: Distribution, recent: Distribution) -> dict[str, Number]:
    fields: dict[str, Number] = {
        "count": lifetime.count, "sum": lifetime.sum, "min": recent.min, "max": recent.max,
        "mean": recent.mean, "stddev": recent.stddev,
    }  # fmt: skip
    for name, q in _QUANTILES:
        fields[name] = recent.quantile(q)
    return fields


class _State(Protocol):
    def series(self, labels: Labels, tick: int) -> Series | None: ...


class Description(NamedTuple):
    """The description of a metric, by ``describe()``.

    Attributes:
        text: What it means; empty if not given.
        unit: The unit of its values, or ``None``; always ``"seconds"`` for timers.
        buckets: The upper bounds of its buckets; empty for the default ones.
    """

    text: str = ""
    unit: str | None = None
    buckets: tuple[float, ...] = ()

    @classmethod
    def checked(cls, text: str, unit: str | None, buckets: Sequence[float]) -> Description:
        """Return a description; raises `InvalidArgument` if an argument is not valid."""
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

    ``labels`` and ``states``, in any order, are what series are made of, as of ``tick``. Use them to read few
    numbers of many series.

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
        self.name, self.kind, self.tick = name, kind, tick
        self.text, unit, self.buckets = described or Description()
        self.unit = "seconds" if kind == "timer" else unit
        self.labels, self.states = labels, states
        self._series: tuple[Series, ...] | None = None

    def __repr__(self) -> str:
        return f"<tapes family {self.name!r}: {self.kind}, {len(self.states)} series>"

    @property
    def series(self) -> tuple[Series, ...]:
        """The series, sorted by labels; made when first read."""
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
        memory: A cache for readers, each under a key of its own. It may have facts about names and labels,
            but no numbers. A source gives the same cache to all its snapshots, and several threads may read,
            so a reader replaces its entry as a whole.
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
        """Return the family of ``name``, or ``None`` if there is no such metric."""
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

        A labelled series is below its name, under its selector: ``tree.jobs.done['{queue="mail"}']``.
        """
        tree = Stats(self.tree())
        tree.freeze()
        return tree

    def tree(self) -> dict[str, Any]:
        """Return the same as `stats` as plain dicts, to be written."""
        tree: dict[str, Any] = {}
        for family in self:
            if not family.series:
                continue
            node: Any = tree
            for segment in family.name.split("."):
                node = node.setdefault(segment, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                _once.warning(  # only workers that disagree on names can come here
                    family.name,
                    "%r is not in the tree: another worker's metric above it has a field of that name",
                    family.name,
                )
                continue
            for series in family.series:
                if series.labels:
                    node.setdefault(selector(series.labels), {}).update(series.fields())
                else:
                    node.update(series.fields())
        return tree
