"""Where a count comes from: when it began, and what of it was told before.

An aggregator that is started anew gets from each worker all that it ever counted, most of which the one
before had; who adds up differences, as StatsD does, would add that up again. So a worker says how much of a
count an earlier aggregator was told; both merge by addition.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

from tapes.clock import wall
from tapes.sums import Number, Total

__all__ = ["NOWHERE", "Origin", "with_told"]


class Origin(NamedTuple):
    """When a count began, and how much of it was told before.

    Attributes:
        created: In seconds since 1970; infinite where nobody knows.
        told: How much of the count aggregators before the present one were told.
    """

    created: float = inf
    told: Number = 0

    @classmethod
    def now(cls) -> Origin:
        """Return that of a count that begins now."""
        return cls(wall())

    @staticmethod
    def merge(origins: Iterable[Origin]) -> Origin:
        """Return that of all counts together."""
        every = list(origins)
        told = [origin.told for origin in every if origin.told]
        return Origin(
            min(origin.created for origin in every),
            Total().add(told).value if told else 0,
        )


NOWHERE = Origin()


def with_told(state: Any, told: Number) -> Any:
    """Return ``state``, of any kind that counts, with ``told`` as what was told of it before."""
    return state._replace(origin=state.origin._replace(told=told))
