"""Whatever is recorded under whatever names is read back from both formats by prometheus_client's parsers."""

from __future__ import annotations

import contextlib
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import tapes
from tapes.errors import InvalidName, KindConflict
from tapes.exposition import FORMS, negotiate
from tapes.exposition import prometheus as exposition
from tapes.snapshot import Snapshot
from tapes.testing import ManualClock

KINDS = ("counter", "gauge", "meter", "histogram", "timer")
SUFFIXES = {
    "counter": ("", "_total", "_created"),
    "gauge": ("",),
    "histogram": ("", "_bucket", "_sum", "_count", "_created"),
}

hostile = st.lists(
    st.one_of(
        st.sampled_from(
            ['"', "\\", "\n", "\r", "\\n", "\u2028", "\x85", "\x0b", "\x00", " ", "\t", "\ufeff"]
        ),
        st.sampled_from(["{", "}", ",", "=", "#", " # ", '"} 1', "%s", "{0}", "é", "\ud800", "\udc80", "?"]),
        st.text(st.characters(), max_size=3),
    ),
    max_size=5,
).map("".join)

stems = st.sampled_from(
    ["a", "b", "a.b", "a_b", "a:b", "A-b", "5xx", "größe", 'a"b', "a\\b", "a b", "total", "_", "-", "ß"]
)
endings = st.sampled_from(
    [
        "",
        "",
        "_total",
        ".total",
        "_created",
        "_count",
        ".sum",
        "_bucket",
        "_info",
        "_net",
        ".seconds",
        "_bytes",
    ]
)
names = st.one_of(
    st.builds("{}{}".format, stems, endings),
    st.sampled_from(["_total", "_created", "1_total", "__total_total"]),
    st.text(min_size=1, max_size=6),
)
label_names = st.sampled_from(
    ["le", "exported_le", "quantile", "_name_", "name", "a", "A", "total", "worker"]
)
labels = st.dictionaries(label_names, hostile, max_size=3)
units = st.one_of(st.none(), st.sampled_from(["bytes", "bytes/s", "°C", "%", "total", "", "a\nb", "_", "5"]))
buckets = st.lists(
    st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-100, 10**8)),
    max_size=5,
    unique=True,
).map(lambda bounds: sorted(set(map(float, bounds))))
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.lists(st.one_of(finite, st.integers(-(2**70), 2**70), st.floats(0, 100)), max_size=4)
metrics = st.tuples(st.sampled_from(KINDS), names, labels, values)
descriptions = st.tuples(names, hostile, units, buckets)


def filled(recorded, described):
    """Return a registry with what could be recorded of that."""
    registry = tapes.Registry(clock=ManualClock(1000.0))
    for name, text, unit, bounds in described:
        with contextlib.suppress(InvalidName):
            registry.describe(name, text, unit=unit, buckets=bounds)
    for kind, name, labels, values in recorded:
        with contextlib.suppress(InvalidName, KindConflict):
            metric = getattr(registry, kind)(name, labels=labels)
            for value in values:
                if kind == "counter":
                    (metric.increment if value >= 0 else metric.decrement)(abs(value))
                elif kind == "gauge":
                    metric.set(value)
                elif kind == "meter":
                    metric.mark(abs(value))
                else:
                    metric.update(abs(value) if kind == "timer" else value)
    return registry


def readable(text):
    """Return what any encoding of ``text`` can say of it."""
    return text.encode("utf-8", "replace").decode()


def written_name(text):
    name = re.sub("[^a-zA-Z0-9_]", "_", text)
    return "_" + name if name[0] in "0123456789" else name


def prometheus_families(family, openmetrics):
    """Yield name, type and samples of what a family should be: ``(suffix, labels, value)`` each.

    OpenMetrics has no sum of values, or beside bounds, that are negative, nor a count without it.
    """
    name = written_name(family.name)
    if family.kind in ("histogram", "timer"):
        unit = re.sub("[^a-zA-Z0-9]+", "_", family.unit or "").strip("_")
        if unit and not name.endswith("_" + unit):
            name += "_" + unit
        default = exposition.TIMER_BUCKETS if family.kind == "timer" else exposition.HISTOGRAM_BUCKETS
        bounds = family.buckets or default
        samples = []
        for one in family.series:
            labels = dict(one.labels)
            if "le" in labels:
                free = "exported_le"
                while free in labels:
                    free = "exported_" + free
                labels[free] = labels.pop("le")
            samples += [
                ("_bucket", {**labels, "le": bound}, one.lifetime.count_below(bound)) for bound in bounds
            ]
            samples.append(("_bucket", {**labels, "le": math.inf}, one.count))
            if not openmetrics or (one.lifetime.min >= 0 and bounds[0] >= 0):
                samples += [("_sum", labels, one.sum), ("_count", labels, one.count)]
            samples.append(("_created", labels, float(f"{one.created:.3f}")))
        yield name, "histogram", samples
    elif family.kind == "gauge":
        yield name, "gauge", [("", dict(one.labels), one.value) for one in family.series]
    else:
        base = name[:-6] if name.endswith("_total") and len(name) > 6 else name
        samples = []
        for one in family.series:
            number = one.total if family.kind == "counter" else one.count
            samples.append(("_total", dict(one.labels), number))
            samples.append(("_created", dict(one.labels), float(f"{one.created:.3f}")))
        yield base, "counter", samples
        lowered = [one for one in family.series if family.kind == "counter" and one.decremented]
        if lowered:
            yield name + "_net", "gauge", [("", dict(one.labels), one.value) for one in lowered]


def expected(snapshot, openmetrics):
    """Return the samples, and help texts and types by name, that a parser should find."""
    found, heads, claimed = {}, {}, set()
    for family in snapshot:
        for name, kind, samples in prometheus_families(family, openmetrics):
            claims = {name + suffix for suffix in SUFFIXES[kind]}
            if claims & claimed or not samples:
                continue
            claimed |= claims
            text = family.text.strip() or f"The {family.kind} {family.name}, recorded by tapes."
            heads[name] = (readable(text), kind)
            mine = {}
            for suffix, labels, value in samples:
                pairs = [(k, readable(v) if isinstance(v, str) else v) for k, v in labels.items()]
                key = (name + suffix, tuple(sorted(pairs)))
                mine.setdefault(key, value)
            found.update(mine)
    if not openmetrics:
        found = {key: value for key, value in found.items() if not is_created(key[0], heads)}
    return found, heads


def is_created(sample, heads):
    base = sample[: -len("_created")]
    return sample.endswith("_created") and heads.get(base, ("", "gauge"))[1] != "gauge"


def read_back(text, openmetrics):
    families = list((parse_openmetrics if openmetrics else parse_text)(text))
    samples = {}
    for family in families:
        for sample in family.samples:
            labels = {
                name: float(value) if name == "le" and family.type == "histogram" else value
                for name, value in sample.labels.items()
            }
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return samples, {family.name: (family.documentation, family.type) for family in families}


@pytest.mark.parametrize("openmetrics", [False, True])
@given(st.lists(metrics, max_size=6), st.lists(descriptions, max_size=3))
@example([("histogram", "a", {"le": "x"}, [1]), ("histogram", "a", {"exported_le": "x"}, [2])], [])
@example([("counter", "a", {"k": "\ud800"}, [1]), ("counter", "a", {"k": "?"}, [2])], [])
@example([("histogram", "a", {}, [3.0])], [("a", "\r x \n", "m/s", [-1.0, 1.0])])
@example([("counter", "_total", {}, [2**60 + 1]), ("gauge", "_total_total", {}, [-(2**60) - 1])], [])
@example([("counter", "a", {}, [5, -3]), ("gauge", "a_net", {}, [1]), ("gauge", "a.created", {}, [1])], [])
@example([("histogram", "a", {}, []), ("counter", "a.count", {}, [1]), ("gauge", "a.count", {}, [1])], [])
def test_everything_is_read_back(openmetrics, recorded, described):
    """Every value, label and help text of every family that doesn't collide, and nothing else."""
    registry = filled(recorded, described)
    text = exposition.render(registry, openmetrics=openmetrics).decode()
    samples, heads = read_back(text, openmetrics)
    wanted, wanted_heads = expected(registry.snapshot(), openmetrics)
    assert samples == wanted
    assert heads == wanted_heads


@given(st.lists(metrics, max_size=6), st.lists(descriptions, max_size=3))
def test_both_formats_show_the_same_families(recorded, described):
    """What collides in one of them is in neither."""
    registry = filled(recorded, described)
    text, openmetrics = (
        read_back(exposition.render(registry, openmetrics=which).decode(), which)[1]
        for which in (False, True)
    )
    assert text == openmetrics


@given(st.lists(st.lists(metrics, max_size=4), min_size=1, max_size=3))
@example([[("counter", "a", {"le": ""}, [])], [(kind, "a", {"le": ""}, []) for kind in ("gauge", "timer")]])
def test_what_is_remembered_of_names_never_shows(steps):
    """A source that was rendered before is written as one that never was, whatever came and went since."""
    registry = tapes.Registry(clock=ManualClock(1000.0))
    for step in steps:
        for kind, name, labels, _ in step:
            with contextlib.suppress(InvalidName, KindConflict):
                if not registry.remove(name, labels=labels):
                    getattr(registry, kind)(name, labels=labels)
        for openmetrics in (False, True):
            snapshot = registry.snapshot()
            afresh = exposition.write(Snapshot(snapshot), openmetrics=openmetrics)
            first, again = (exposition.write(snapshot, openmetrics=openmetrics) for _ in range(2))
            assert first == again == afresh == exposition.render(registry, openmetrics=openmetrics)


@given(st.lists(st.floats(-1e306, 1e306), max_size=30), buckets)
@example([1.0, 1e200, -1e200], [-1e300, 1e38, 1e100, 1e300])
@example([100.0], [99.9, 100.0, 100.1])
def test_counts_below_many_bounds_are_those_below_each(values, bounds):
    """In one pass or one by one; the last is the count, and none is less than the one before it."""
    registry = tapes.Registry(clock=ManualClock(1000.0))
    for value in values:
        registry.histogram("h").update(value)
    registry.histogram("h")
    (one,) = registry.snapshot().series("h")
    counts = one.lifetime.counts_below(tuple(bounds))
    assert counts == [*map(one.lifetime.count_below, bounds), one.count]
    assert counts == sorted(counts)
    for bound, count in zip(bounds, counts):
        assert count >= sum(value <= bound for value in values)


media = st.sampled_from(
    [
        "text/plain",
        "TEXT/*",
        "*/*",
        "application/json",
        "application/*",
        "application/openmetrics-text",
        "x/y",
        "",
    ]
)
parameters = st.sampled_from(
    ["", ";q=0", ";q=1", ";q=0.5", ";q=x", "; version=0.0.4", ";version=1.0.0", ";;", ";q"]
)
accepts = st.one_of(
    st.text(max_size=20),
    st.lists(st.builds("{}{}{}".format, media, parameters, parameters), max_size=4).map(",".join),
)


@given(accepts)
def test_any_accept_header_gets_an_answer(accept):
    """Of any text, one of the forms."""
    assert negotiate(accept) in FORMS
