"""tapes: application metrics for services of many processes.

Any worker answers for the whole service, exactly, for little more than a method call.

The functions of this module use one default registry. It is local until `connect` attaches it to a running
aggregator; from then on `get_stats` answers for every connected process. Everything here is safe from any
thread. Adapters, reporters and the aggregator are in modules of their own, imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tapes.errors import TapesError
from tapes.meta import metered_meta
from tapes.registry import Registry, default_registry

if TYPE_CHECKING:
    from tapes.distributed.registry import DistributedRegistry as DistributedRegistry

__all__ = [
    "Registry",
    "TapesError",
    "close",
    "connect",
    "counter",
    "default_registry",
    "describe",
    "gauge",
    "get_stats",
    "histogram",
    "meter",
    "metered_meta",
    "timer",
]

__version__ = "1.0.0.dev0"

counter = default_registry.counter
describe = default_registry.describe
gauge = default_registry.gauge
get_stats = default_registry.get_stats
histogram = default_registry.histogram
meter = default_registry.meter
timer = default_registry.timer


def connect(addr: str | None = None) -> None:
    """Connect the default registry to a running aggregator; call it after a fork, not before.

    Args:
        addr: Where the aggregator listens; by default ``TAPES_ADDR`` from the environment, or
            ``ipc://tapes_metrics.ipc`` in the working directory.

    Raises:
        MissingExtra: If pyzmq or msgpack is not installed.
        AddressError: If the address can't be used.
    """
    from tapes.distributed.connection import connect as connect_registry

    connect_registry(default_registry, addr)


def close() -> None:
    """Hand the default registry's last values to the aggregator and disconnect; nothing if not connected.

    What was handed over is counted there, so the registry starts again from zero; gauges stay. Takes 1 s at
    most, if the aggregator doesn't answer.
    """
    if default_registry.connection is not None:
        from tapes.distributed.connection import close as close_registry

        close_registry(default_registry)


def __dir__() -> list[str]:
    return [*__all__, "DistributedRegistry", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "DistributedRegistry":
        from tapes.distributed.registry import DistributedRegistry

        return DistributedRegistry
    raise AttributeError(f"module 'tapes' has no attribute {name!r}")
