"""Who is measured: for each library the names that its statements use, and one statement per row.

In a statement, ``v`` is a latency in seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from measure import Statement

import tapes
from tapes.metrics import Counter, Histogram, Meter, Timer

__all__ = ["ROWS", "all_statements", "unfolded"]

ROWS = {
    "increment": "count one event",
    "look-up": "count one event, metric looked up by two labels",
    "update": "record a value into a distribution",
    "mark": "mark an event of a meter",
    "set": "set a gauge",
    "with": "time a block",
    "decorator": "time a function",
}


def _tapes() -> tuple[dict[str, Any], dict[str, str]]:
    registry = tapes.Registry()
    counter, histogram, meter = registry.counter("c"), registry.histogram("h"), registry.meter("m")
    gauge, timer = registry.gauge("g"), registry.timer("t")

    @timer.time()
    def timed() -> None:
        pass

    return locals(), {
        "increment": "counter.increment()",
        "look-up": "registry.counter('l', method='GET', code='200').increment()",
        "update": "histogram.update(v)",
        "mark": "meter.mark()",
        "set": "gauge.set(v)",
        "with": "with timer.time(): pass",
        "decorator": "timed()",
    }


def _prometheus_client() -> tuple[dict[str, Any], dict[str, str]]:
    import prometheus_client as prometheus

    registry = prometheus.CollectorRegistry()
    counter = prometheus.Counter("c", "c", registry=registry)
    labelled = prometheus.Counter("l", "l", ["method", "code"], registry=registry)
    gauge = prometheus.Gauge("g", "g", registry=registry)
    histogram = prometheus.Histogram("h", "h", registry=registry)

    @histogram.time()
    def timed() -> None:
        pass

    return locals(), {
        "increment": "counter.inc()",
        "look-up": "labelled.labels(method='GET', code='200').inc()",
        "update": "histogram.observe(v)",
        "set": "gauge.set(v)",
        "with": "with histogram.time(): pass",
        "decorator": "timed()",
    }


def _opentelemetry() -> tuple[dict[str, Any], dict[str, str]]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    meter = MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False).get_meter("b")
    counter, gauge = meter.create_counter("c"), meter.create_gauge("g")
    histogram = meter.create_histogram("h")
    return locals(), {
        "increment": "counter.add(1)",
        "look-up": "counter.add(1, {'method': 'GET', 'code': '200'})",
        "update": "histogram.record(v)",
        "set": "gauge.set(v)",
    }


def _pyformance() -> tuple[dict[str, Any], dict[str, str]]:
    import pyformance

    registry = pyformance.MetricsRegistry()
    counter, histogram, meter = registry.counter("c"), registry.histogram("h"), registry.meter("m")
    gauge, timer = registry.gauge("g"), registry.timer("t")
    return locals(), {
        "increment": "counter.inc()",
        "update": "histogram.add(v)",
        "mark": "meter.mark()",
        "set": "gauge.set_value(v)",
        "with": "with timer.time(): pass",
    }


def _ddsketch() -> tuple[dict[str, Any], dict[str, str]]:
    from ddsketch import DDSketch

    sketch = DDSketch(0.01)
    return locals(), {"update": "sketch.add(v)"}


def _promrs() -> tuple[dict[str, Any], dict[str, str]]:
    import promrs

    counter, histogram = promrs.Counter("c", "c"), promrs.Histogram("h", "h")
    labelled = promrs.Counter("l", "l", ["method", "code"])
    return locals(), {
        "increment": "counter.inc()",
        "look-up": "labelled.labels(method='GET', code='200').inc()",
        "update": "histogram.observe(v)",
        "with": "with histogram.time(): pass",
    }


_LIBRARIES: dict[str, tuple[str, Callable[[], tuple[dict[str, Any], dict[str, str]]]]] = {
    "tapes": ("tapes", _tapes),
    "prometheus_client": ("prometheus_client", _prometheus_client),
    "OpenTelemetry": ("opentelemetry.sdk", _opentelemetry),
    "pyformance": ("pyformance", _pyformance),
    "ddsketch": ("ddsketch", _ddsketch),
    "promrs (Rust)": ("promrs", _promrs),
}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def all_statements() -> dict[tuple[str, str], Statement]:
    """Return the statement of every library that is installed and every row that it can do."""
    statements = {}
    for library, (module, make) in _LIBRARIES.items():
        if _installed(module):
            namespace, codes = make()
            statements.update({(library, row): Statement(code, namespace) for row, code in codes.items()})
    return statements


def unfolded() -> dict[str, tuple[Statement, Statement]]:
    """Return each call of tapes with nothing folded, and an empty method of the same signature."""

    def of(kind: type[Any]) -> Any:
        def _fold(self: Any, now: float, *, wait: bool = False) -> None:
            self._buffer.clear()

        registry = tapes.Registry()
        unfolding = type(f"Unfolded{kind.__name__}", (kind,), {"__slots__": (), "_fold": _fold})
        return unfolding("x", (), registry.clock, registry.reject)

    class Empty:
        def increment(self, n: int = 1) -> None:
            pass

        def update(self, value: float) -> None:
            pass

        def mark(self, n: int = 1) -> None:
            clock()

    clock = tapes.Registry().clock
    names = {"o": Empty(), "c": of(Counter), "h": of(Histogram), "m": of(Meter), "t": of(Timer)}
    return {
        "increment()": (Statement("c.increment()", names), Statement("o.increment()", names)),
        "update(v)": (Statement("h.update(v)", names), Statement("o.update(v)", names)),
        "mark()": (Statement("m.mark()", names), Statement("o.mark()", names)),
    }
