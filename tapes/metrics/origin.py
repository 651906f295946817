"""The origin of a count: when it began, and its baseline.

An aggregator without a journal gets from each worker everything that it ever counted, most of which an
earlier aggregator had. A reporter of differences, such as StatsD's, must not send that again. So each count
has a *baseline*: how much of it earlier aggregators had. Both parts merge, so the total of a service has them
too.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

from tapes.clock import wall
from tapes.sums import Number, Total


class Origin(NamedTuple):
    """When a count began, and how much of it is its baseline.

    Attributes:
        created: In seconds since 1970; infinite if it is unknown.
        baseline: How much of the count aggregators before the present one had.
    """

    created: float = inf
    baseline: Number = 0

    @classmethod
    def now(cls) -> Origin:
        """Return the origin of a count that begins now."""
        return cls(wall())

    @staticmethod
    def merge(origins: Iterable[Origin]) -> Origin:
        """Return the origin of the sum of all counts."""
        every = list(origins)
        baselines = [origin.baseline for origin in every if origin.baseline]
        return Origin(
            min(origin.created for origin in every),
            Total().add(baselines).value if baselines else 0,
        )


NOWHERE = Origin()


def with_baseline(state: Any, baseline: Number) -> Any:
    """Return a count's ``state``, of any kind, with that ``baseline``."""
    origin = state.origin
    if origin.baseline == baseline:
        return state
    return state._replace(origin=origin._replace(baseline=baseline))
