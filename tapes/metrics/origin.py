"""The origin of a count: when it began, and its baseline.

An aggregator without a journal gets from each worker everything that it ever counted, most of which an
earlier aggregator had. A reporter of differences, such as StatsD's, must not send that again. So each count
has a *baseline*: how much of it earlier aggregators had. Both parts merge, so a service's total has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, NamedTuple

from tapes.clock import wall
from tapes.sums import Number, Total


class Origin(NamedTuple):
    """When a count began, in seconds since 1970 (infinite if unknown), and how much of it is its baseline."""

    created: float = inf
    baseline: Number = 0

    @classmethod
    def now(cls) -> Origin:
        return cls(wall())

    @staticmethod
    def merge(origins: Iterable[Origin]) -> Origin:
        """Return the origin of the sum of all counts."""
        every = list(origins)
        baselines = [origin.baseline for origin in every if origin.baseline]
        baseline = Total().add(baselines).value if baselines else 0
        return Origin(min(origin.created for origin in every), baseline)


NOWHERE = Origin()


def with_baseline(state: Any, baseline: Number) -> Any:
    """Return a count's ``state``, of any kind, with that ``baseline``."""
    origin = state.origin
    return state if origin.baseline == baseline else state._replace(origin=origin._replace(baseline=baseline))
