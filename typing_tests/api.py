"""What type checkers see of the public face; `make check` checks this file and never runs it.

An ignored error that is no longer one is an error too, so what must be refused is refused.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar, assert_type

import tapes
from tapes import Counter, Gauge, Histogram, Meter, Stats, Timer
from tapes.contrib.asgi import TapesMiddleware
from tapes.contrib.options import Options
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.exposition.prometheus import render
from tapes.metrics.timer import Timing
from tapes.reporting.http import HTTPReporter
from tapes.snapshot import Family, Series, Snapshot
from tapes.testing import ManualClock, assert_recorded, strict

# The makers, of the module and of a registry, with labels in both spellings.

assert_type(tapes.counter("a"), Counter)
assert_type(tapes.meter("b", queue="mail"), Meter)
assert_type(tapes.histogram("c", labels={"name": "x"}, queue=3), Histogram)
assert_type(tapes.timer("d"), Timer)
assert_type(tapes.gauge("e", lambda: 12, merge="max", weak=True, pool="x"), Gauge)
registry = tapes.Registry(prefix="app", labels={"region": "eu"}, clock=ManualClock(), max_series=10)
assert_type(registry.counter("a"), Counter)
tapes.counter(5)  # type: ignore[arg-type]
tapes.gauge("e", 12)  # type: ignore[arg-type]
tapes.gauge("e", merge="average")  # type: ignore[arg-type]
tapes.conter("a")  # type: ignore[attr-defined]
tapes.Registry("app")  # type: ignore[call-arg]

# Recording.

registry.counter("a").increment()
registry.counter("a").decrement(2.5)
registry.meter("b").mark(3)
registry.histogram("c").update(0.5)
registry.gauge("e").set(1)
registry.timer("d").update(0.25)
registry.histogram("c").update("0.5")  # type: ignore[arg-type]
registry.histogram("c").update()  # type: ignore[call-arg]

with registry.timer("d").time() as timing:
    assert_type(timing, Timing)


# Decorators keep the signature of what they decorate.


@registry.timer("d").time()
def plain(number: int, *, text: str = "") -> bool:
    return bool(text * number)


@registry.timer("d").time()
async def coroutine(number: int) -> str:
    return str(number)


@registry.timer("d").time()
def generator(number: int) -> Iterator[int]:
    yield number


@registry.timer("d").time()
async def async_generator(number: int) -> AsyncIterator[int]:
    yield number


assert_type(plain(3, text="x"), bool)
plain("3")  # type: ignore[arg-type]
assert_type(list(generator(3)), list[int])


async def consume() -> None:
    assert_type(await coroutine(3), str)
    async for number in async_generator(3):
        assert_type(number, int)


# mypy follows no metaclass that is an expression; the declarations tell it what it needs.

metrics: list[tuple[str, str, Callable[[str], Any]]] = [("latency", "endpoints.{}.latency", tapes.timer)]


class Endpoint(metaclass=tapes.metered_meta(metrics, base=abc.ABCMeta)):  # type: ignore[metaclass]
    latency: ClassVar[Timer]

    @abc.abstractmethod
    def work(self) -> str: ...


class Widgets(Endpoint):
    def work(self) -> str:
        with self.latency.time():
            return "done"


assert_type(Widgets.latency, Timer)
assert_type(Widgets().work(), str)
factory: Callable[[str], Timer] = registry.timer
tapes.metered_meta([("latency", "endpoints.{}.latency")])  # type: ignore[list-item]

# Reading. Values of `Stats` are `Any`, by attribute and by key; the tree itself is a dictionary.

stats = tapes.get_stats()
assert_type(stats, Stats)
assert_type(registry.snapshot().stats(), Stats)
assert_type(stats.jobs.done.value, Any)
assert_type(stats["jobs"], Any)
assert_type(list(stats), list[str])


async def read() -> None:
    assert_type(await tapes.get_stats_async(), Stats)


snapshot = registry.snapshot()
assert_type(snapshot, Snapshot)
assert_type(snapshot.series("a"), tuple[Series, ...])
for family in snapshot:
    assert_type(family, Family)
assert_type(render(registry, openmetrics=True), bytes)

# Reporters, the aggregator, tests.

reporter = HTTPReporter(8080, registry, host="127.0.0.1")
aggregator = RegistryAggregator([reporter], "ipc://tapes_metrics.ipc")
assert_type(tapes.DistributedRegistry(), DistributedRegistry)
assert_type(tapes.DistributedRegistry().close(), None)
with strict() as same:
    assert_type(same, tapes.Registry)
assert_recorded("a", {"queue": "mail"}, value=1, registry=registry)
interval: timedelta | None = timedelta(seconds=10)

# Adapters. All take the same options, which are checked by name and by type.

options: Options = {"metrics_path": None, "exclude": ["/health", "/static/*"], "labels": {"region": "eu"}}


async def application(scope: Any, receive: Any, send: Any) -> None: ...


TapesMiddleware(application, registry, **options)
TapesMiddleware(
    application, body_sizes=True, guard=lambda scope: True, prefix="shop", route=lambda scope: None
)
TapesMiddleware(application, metric_path="/metrics")  # type: ignore[call-arg]
TapesMiddleware(application, exclude=5)  # type: ignore[arg-type]
