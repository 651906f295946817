"""The Prometheus text format and OpenMetrics.

Counters and meters are counters (``…_total``), gauges are gauges, timers and histograms are histograms with
cumulative buckets. A bucket includes the whole bin of the sketch that its bound is in: values up to 0.8 %
above the bound may count too. OpenMetrics also has the time at which each began (``…_created``).

Both formats show the same families: a family that would collide in one of them is left out of both. Names
have only letters, digits and ``_``, which every scraper accepts whatever escaping it supports.

Theory of the cost. Most of a line, its labels, never changes. The order of the lines changes only when series
come or go. Both are kept from one snapshot of a source to the next, family by family. So a scrape only reads
the numbers and appends them. No number is kept.

Source: the Prometheus text format 0.0.4 and OpenMetrics 1.0.0 for the syntax; OpenTelemetry's HTTP semantic
conventions for the buckets of timers, its SDK's defaults for those of histograms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isfinite
from operator import attrgetter
from typing import Any, NamedTuple

from tapes.exposition.spelling import bound_labels, braces, escape_help, metric_name, unit_name, without_le
from tapes.naming import Labels
from tapes.once import OnceLogger
from tapes.registry import Registry
from tapes.snapshot import Family, Snapshot
from tapes.sums import Number

__all__ = ["HISTOGRAM_BUCKETS", "TIMER_BUCKETS", "render", "write"]

TIMER_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Upper bounds in seconds."""

HISTOGRAM_BUCKETS = (
    0.0, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0, 250.0, 500.0, 750.0, 1000.0, 2500.0, 5000.0, 7500.0, 10000.0,
)  # fmt: skip
"""Upper bounds in the histogram's unit."""

_TYPES = {
    "counter": "counter", "meter": "counter", "gauge": "gauge",
    "histogram": "histogram", "timer": "histogram",
}  # fmt: skip

_CLAIMS = {
    "counter": ("", "_total", "_created"),
    "gauge": ("",),
    "histogram": ("", "_bucket", "_sum", "_count", "_created"),
}
"""Type to the suffixes of a family's sample names, in either format."""

_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "counter": attrgetter("up.value"), "meter": attrgetter("count.value"), "gauge": attrgetter("value"),
}  # fmt: skip
"""Kind to what reads the number of a state."""

_TAKEN_AWAY = attrgetter("down.value")
_MEMORY = "prometheus"

_once = OnceLogger(logging.getLogger("tapes.exposition"), max_keys=4096)


class _Written(NamedTuple):
    """The written labels of a family's series.

    Attributes:
        order: The indexes of the series that are shown, sorted by labels.
        heads: The text between the name and the number of each one.
    """

    kind: str
    labels: Sequence[Labels]
    order: Sequence[int]
    heads: Sequence[str]


class _Metric(NamedTuple):
    """A family in Prometheus's sense: its name without suffixes, its type, and what writes its samples."""

    name: str
    type: str
    samples: Callable[[bool], list[str]]


def render(registry: Registry, *, openmetrics: bool = False) -> bytes:
    """Write all values of ``registry``, for the whole service if it is connected.

    Args:
        registry: Any registry.
        openmetrics: Write OpenMetrics 1.0.0 instead of the text format 0.0.4.

    Raises:
        AggregatorUnavailable: If the registry is connected and the aggregator doesn't answer.
    """
    session = registry.session.resolved_for_read()
    form = "openmetrics" if openmetrics else "prometheus"
    return session.render(form, lambda snapshot, _: write(snapshot, openmetrics=openmetrics))


def write(snapshot: Snapshot, *, openmetrics: bool = False) -> bytes:
    """Write ``snapshot``; see `render`."""
    lines: list[str] = []
    owners: dict[str, str] = {}
    before = snapshot.memory.get(_MEMORY, {})
    now: dict[str, _Written] = {}
    for family in snapshot:
        written = before.get(family.name)
        if written is None or written.kind != family.kind or written.labels != family.labels:
            written = _written(family)
        now[family.name] = written
        for metric in _metrics(family, written):
            name = metric.name
            claims = [name + suffix for suffix in _CLAIMS[metric.type]]
            taken = [owners[claim] for claim in claims if claim in owners]
            if taken:
                _once.warning(
                    (name, taken[0], family.name),
                    "%r is not exposed: its Prometheus name %s, or one of its samples', is taken by %r; "
                    "rename one",
                    family.name, name, taken[0],
                )  # fmt: skip
                continue
            samples = metric.samples(openmetrics)
            if samples:
                owners.update(dict.fromkeys(claims, family.name))
                lines += _head(metric, family, openmetrics)
                lines += samples
    snapshot.memory[_MEMORY] = now
    if openmetrics:
        lines.append("# EOF")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace") if lines else b""


def _head(metric: _Metric, family: Family, openmetrics: bool) -> Iterator[str]:
    name = metric.name if openmetrics or metric.type != "counter" else metric.name + "_total"
    text = family.text.strip() or f"The {family.kind} {family.name}, recorded by tapes."
    yield f"# HELP {name} {escape_help(text, openmetrics)}"
    yield f"# TYPE {name} {metric.type}"
    unit = unit_name(family.unit)
    if openmetrics and unit and name.endswith("_" + unit):
        yield f"# UNIT {name} {unit}"


def _metrics(family: Family, written: _Written) -> Iterator[_Metric]:
    name = metric_name(family.name)
    kind = _TYPES[family.kind]
    states: list[Any] = list(map(family.states.__getitem__, written.order))
    if kind == "histogram":
        unit = unit_name(family.unit)
        if unit and not name.endswith("_" + unit):
            name = f"{name}_{unit}"
        bounds = family.buckets or (TIMER_BUCKETS if family.kind == "timer" else HISTOGRAM_BUCKETS)
        yield _Metric(name, kind, partial(_distributions, name, written.heads, states, bounds))
        return
    numbers = list(map(_NUMBERS[family.kind], states))
    if kind == "gauge":
        yield _Metric(name, kind, partial(_gauges, name, written.heads, numbers))
        return
    base = name[: -len("_total")] if name.endswith("_total") and name != "_total" else name
    yield _Metric(base, kind, partial(_counters, base, written.heads, numbers, states))
    if family.kind == "counter" and any(map(_TAKEN_AWAY, states)):
        lowered = [place for place, state in enumerate(states) if _TAKEN_AWAY(state)]
        heads = [written.heads[place] for place in lowered]
        net = [states[place].counted for place in lowered]
        yield _Metric(name + "_net", "gauge", partial(_gauges, name + "_net", heads, net))


def _counters(
    name: str, heads: Sequence[str], numbers: list[Number], states: list[Any], openmetrics: bool
) -> list[str]:
    if not openmetrics:
        return [f"{name}_total{head}{number!r}" for head, number in zip(heads, numbers)]
    return [
        f"{name}_total{head}{number!r}{_began(name, head, state)}"
        for head, number, state in zip(heads, numbers, states)
    ]


def _gauges(name: str, heads: Sequence[str], numbers: list[Number | None], openmetrics: bool) -> list[str]:
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):  # the producers of some failed
        heads = [head for head, number in zip(heads, numbers) if number is not None]
    return [f"{name}{head}{number!r}" for head, number in zip(heads, known)]


def _distributions(
    name: str, heads: Sequence[str], states: list[Any], bounds: tuple[float, ...], openmetrics: bool
) -> list[str]:
    lines: list[str] = []
    le_labels = bound_labels(bounds)
    for head, state in zip(heads, states):
        view = state.sketch.lifetime
        counts = view.counts_below(bounds)
        bucket = f"{name}_bucket{head[:-2]}," if len(head) > 1 else f"{name}_bucket{{"
        lines += [f"{bucket}{le}{count}" for le, count in zip(le_labels, counts)]
        if not openmetrics:
            lines += (f"{name}_sum{head}{view.sum}", f"{name}_count{head}{counts[-1]}")
        elif bounds[0] < 0 or view.min < 0:
            # OpenMetrics has no sum, and hence no count, where values or bounds are negative.
            lines[-1] += _began(name, head, state)
        else:
            began = _began(name, head, state)
            lines += (f"{name}_sum{head}{view.sum}", f"{name}_count{head}{counts[-1]}{began}")
    return lines


def _began(name: str, head: str, state: Any) -> str:
    created = state.origin.created
    return f"\n{name}_created{head}{created:.3f}" if isfinite(created) else ""


def _written(family: Family) -> _Written:
    """Write the labels of a family; of series that are written alike, the first one is shown."""
    labels = family.labels
    free_le = _TYPES[family.kind] == "histogram"
    order: list[int] = []
    heads: dict[str, None] = {}
    for place in sorted(range(len(labels)), key=labels.__getitem__):
        text = braces(without_le(labels[place]) if free_le else labels[place])
        if text in heads:
            _once.warning(
                (family.name, text),
                "a series of %r is not exposed: another one of it is written %s too; give one other labels",
                family.name, text.strip(),
            )  # fmt: skip
            continue
        heads[text] = None
        order.append(place)
    return _Written(family.kind, labels, order, list(heads))
