"""The Prometheus text format and OpenMetrics.

Counters and meters are counters (``…_total``), gauges are gauges, timers and histograms are histograms with
cumulative buckets. A bucket's bound includes the whole bin of the sketch that it falls into: what is at or
below it always counts, what is up to 0.8 % above may.

Source: the Prometheus text format 0.0.4 and OpenMetrics 1.0.0 for the syntax; OpenTelemetry's HTTP
semantic conventions for the buckets of timers, its SDK's defaults for those of histograms.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from tapes.naming import Labels, escape_label_value
from tapes.registry import Registry
from tapes.snapshot import Family, Snapshot
from tapes.sums import Number

__all__ = ["HISTOGRAM_BUCKETS", "TIMER_BUCKETS", "render", "write"]

TIMER_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Upper bounds in seconds."""

HISTOGRAM_BUCKETS = (0, 5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10000)
"""Upper bounds in the histogram's unit."""

_TYPES = {
    "counter": "counter", "meter": "counter", "gauge": "gauge",
    "histogram": "histogram", "timer": "histogram",
}  # fmt: skip

_log = logging.getLogger("tapes.exposition")


def render(registry: Registry, *, openmetrics: bool = False) -> bytes:
    """Write all values of ``registry``, for the whole service if it is connected.

    Args:
        registry: Any registry.
        openmetrics: Write OpenMetrics 1.0.0 instead of the text format 0.0.4.

    Raises:
        AggregatorUnavailable: If the registry is connected and the aggregator doesn't answer.
    """
    if registry.connection is not None:
        return registry.connection.render("openmetrics" if openmetrics else "prometheus")
    return write(registry.snapshot(), openmetrics=openmetrics)


def write(snapshot: Snapshot, *, openmetrics: bool = False) -> bytes:
    """Write ``snapshot``; see `render`."""
    lines: list[str] = []
    owners: dict[str, str] = {}
    for family in snapshot:
        for name, kind, text, samples in _families(family, openmetrics):
            base = name[: -len("_total")] if openmetrics and kind == "counter" else name
            taken = [owners[claim] for claim in _claims(name, base, kind) if claim in owners]
            if taken:
                _collision(name, taken[0], family.name)
                continue
            owners.update(dict.fromkeys(_claims(name, base, kind), family.name))
            lines.append(f"# HELP {base} {_escape_help(text, openmetrics)}")
            lines.append(f"# TYPE {base} {kind}")
            if openmetrics and family.unit and base.endswith("_" + family.unit):
                lines.append(f"# UNIT {base} {family.unit}")
            lines.extend(samples)
    if openmetrics:
        lines.append("# EOF")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace") if lines else b""


def _claims(name: str, base: str, kind: str) -> set[str]:
    """Return the names that no other family may use: its own, and those of its samples."""
    suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ()
    return {name, base, *(name + suffix for suffix in suffixes)}


def _families(family: Family, openmetrics: bool) -> Iterator[tuple[str, str, str, Iterable[str]]]:
    """Yield name, type, help text and sample lines of what ``family`` is to Prometheus."""
    name = metric_name(family.name)
    if family.unit and family.kind in ("timer", "histogram") and not name.endswith("_" + family.unit):
        name = metric_name(f"{name}_{family.unit}")
    text = family.text or f"The {family.kind} {family.name}, recorded by tapes."
    kind = _TYPES[family.kind]
    series: Any = family.series
    if not series:
        return
    if kind == "histogram":
        bounds = TIMER_BUCKETS if family.kind == "timer" else HISTOGRAM_BUCKETS
        yield name, kind, text, _distribution(name, series, bounds, openmetrics)
    elif family.kind == "gauge":
        yield name, kind, text, (_sample(name, one.labels, one.value) for one in series)
    else:
        total = name if name.endswith("_total") else name + "_total"
        field = "total" if family.kind == "counter" else "count"
        yield total, kind, text, (_sample(total, s.labels, getattr(s, field)) for s in series)
        lowered = [one for one in series if family.kind == "counter" and one.decremented]
        if lowered:
            net = name + "_net"
            yield net, "gauge", text, [_sample(net, one.labels, one.value) for one in lowered]


def _distribution(
    name: str, series: Iterable[Any], bounds: tuple[float, ...], openmetrics: bool
) -> Iterator[str]:
    for one in series:
        pairs = _label_pairs(_without_le(one.labels))
        before = f"{name}_bucket{{{pairs},le=" if pairs else f"{name}_bucket{{le="
        view = one.lifetime
        for bound in bounds:
            yield f'{before}"{_number(float(bound))}"}} {_number(view.count_below(bound))}'
        yield f'{before}"+Inf"}} {_number(view.count)}'
        if openmetrics and view.min < 0:
            continue  # OpenMetrics has no sum, and hence no count, where values are negative
        braces = f"{{{pairs}}}" if pairs else ""
        yield f"{name}_sum{braces} {_number(view.sum)}"
        yield f"{name}_count{braces} {_number(view.count)}"


def _without_le(labels: Labels) -> Labels:
    """Return ``labels`` with ``le``, which is the bucket's bound, under a name that is free."""
    names = [name for name, _ in labels]
    if "le" not in names:
        return labels
    free = "exported_le"
    while free in names:
        free = "exported_" + free
    return tuple((free if name == "le" else name, value) for name, value in labels)


def _sample(name: str, labels: Labels, value: Number) -> str:
    pairs = _label_pairs(labels)
    return f"{name}{{{pairs}}} {_number(value)}" if pairs else f"{name} {_number(value)}"


@lru_cache(maxsize=1 << 14)
def _label_pairs(labels: Labels) -> str:
    return ",".join([f'{name}="{escape_label_value(value)}"' for name, value in labels])


def _number(value: Number) -> str:
    return repr(value) if type(value) is float else str(value)


@lru_cache(maxsize=4096)
def metric_name(name: str) -> str:
    """Write a metric's name as Prometheus wants it: dots and whatever else it refuses become ``_``."""
    name = re.sub(r"[^a-zA-Z0-9_:]", "_", name)
    return "_" + name if name[0].isdigit() else name


def _escape_help(text: str, openmetrics: bool) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if openmetrics else text


@lru_cache(maxsize=256)
def _collision(name: str, first: str, second: str) -> None:
    """Log, once for each pair, that the second metric can't be shown."""
    _log.warning(
        "%r is not exposed: its Prometheus name %s, or one of its samples', is taken by %r; rename one",
        second, name, first,
    )  # fmt: skip
