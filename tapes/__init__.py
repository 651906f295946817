"""tapes: application metrics for services of many processes.

Any worker answers for the whole service, exactly, for little more than a method call.

The functions of this module use one default registry. It is local until `join` or `connect` connects it to an
aggregator; from then on `get_stats` answers for every connected process. If ``TAPES_ADDR`` is set, and in
processes that a connected one forks or spawns, the first metric or the first read connects it. Everything
here is safe from any thread. Adapters, reporters and the aggregator are in modules of their own, which are
imported when you use them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tapes import forks, under_uwsgi
from tapes.environment import configured_address, is_disabled, is_spawned, service_address, warn_if_unused
from tapes.errors import TapesError, UnknownAttribute
from tapes.meta import metered_meta
from tapes.metrics import Counter, Gauge, Histogram, Meter, Timer
from tapes.once import OnceLogger
from tapes.registry import Registry, default_registry
from tapes.session import LazySession, LocalSession
from tapes.snapshot import Stats

if TYPE_CHECKING:
    # Tools that freeze applications find here what is imported later.
    from tapes.distributed import connection  # noqa: F401
    from tapes.distributed.aggregator import main  # noqa: F401
    from tapes.distributed.registry import DistributedRegistry as DistributedRegistry

__all__ = [
    "Counter", "Gauge", "Histogram", "Meter", "Registry", "Stats", "TapesError", "Timer",
    "close", "connect", "counter", "default_registry", "describe", "gauge", "get_stats", "get_stats_async",
    "histogram", "join", "meter", "metered_meta", "timer",
]  # fmt: skip

__version__ = "1.0.0.dev0"

counter = default_registry.counter
describe = default_registry.describe
gauge = default_registry.gauge
get_stats = default_registry.get_stats
get_stats_async = default_registry.get_stats_async
histogram = default_registry.histogram
meter = default_registry.meter
timer = default_registry.timer


def connect(addr: str | None = None) -> None:
    """Connect the default registry to a running aggregator; forked children connect too.

    Args:
        addr: Where the aggregator listens; by default ``TAPES_ADDR`` from the environment, or
            ``ipc://tapes_metrics.ipc`` in the working directory.

    Raises:
        MissingExtra: If pyzmq or msgpack is not installed.
        AddressError: If the address can't be used.
    """
    if not is_disabled():
        _distributed("connection").connect(default_registry, addr)


def join(addr: str | None = None) -> None:
    """Connect the default registry to the aggregator of its service, and start one if none runs.

    The first process starts it: a process of its own, which lives as long as any process of the service and
    exits 2 s after the last. Sets ``TAPES_ADDR`` for the processes that this one starts.

    With ``TAPES_AUTOSTART=0`` no aggregator is started; with ``TAPES_DISABLED=1`` this does nothing. With
    ``TAPES_HTTP=PORT`` the aggregator answers over HTTP; with ``TAPES_STATSD=HOST:PORT`` it sends to StatsD.

    Args:
        addr: The address of the aggregator; by default ``TAPES_ADDR`` from the environment, or else a private
            directory that all processes of the service find: those of one gunicorn, uWSGI, multiprocessing
            parent, or forked from one process.

    Raises:
        MissingExtra: If pyzmq or msgpack is not installed.
        AddressError: If the address can't be used.
        AggregatorUnavailable: If the aggregator can't be started.
    """
    if not is_disabled():
        _distributed("connection").join(default_registry, addr)


def close() -> None:
    """Send the default registry's last values to the aggregator and disconnect; nothing if not connected.

    They are counted there, so the registry starts again from zero; gauges stay. Takes at most 1 s, if the
    aggregator doesn't answer.
    """
    default_registry.session.close()


def __dir__() -> list[str]:
    return [*__all__, "DistributedRegistry", "__version__"]


if not TYPE_CHECKING:  # a type checker would take every name for one of the module

    def __getattr__(name: str) -> Any:
        if name == "DistributedRegistry":
            return _distributed("registry").DistributedRegistry
        raise _unknown(name)


def _unknown(name: str) -> AttributeError:
    """Return the error of a name that this module does not have."""
    what = f"module 'tapes' has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(what)
    if name in ("contrib", "distributed", "exposition", "reporting", "testing"):
        return UnknownAttribute(what, attribute=name, remedy=f"import tapes.{name}")
    from difflib import get_close_matches  # takes as long to import as some of tapes

    close = get_close_matches(name, __dir__(), 1)
    remedy = f"did you mean {close[0]!r}?" if close else "dir(tapes) lists what there is"
    return UnknownAttribute(what, attribute=name, remedy=remedy)


def _distributed(module: str) -> Any:
    return forks.import_module(f"tapes.distributed.{module}")


def _connect_as_configured() -> None:
    address = "" if under_uwsgi.is_master() else service_address()  # no thread may run when uWSGI forks
    if address:
        try:
            connect(address)
        except Exception as error:  # the import of the user's application must not fail
            _once.warning(str(error), "tapes can't connect as configured by the environment: %s", error)


_once = OnceLogger(logging.getLogger("tapes"))

if configured_address():
    default_registry.use(LazySession(default_registry, _connect_as_configured))
elif is_spawned():
    default_registry.use(LazySession(default_registry, _connect_as_configured, is_pending=False, sleeps=True))
else:
    default_registry.use(LocalSession(default_registry, _connect_as_configured, looks=True))
warn_if_unused(default_registry)
