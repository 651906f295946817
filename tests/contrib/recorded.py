"""What the adapters have recorded into a registry."""

from __future__ import annotations

import tapes

DURATION = "http.server.request.duration"
ACTIVE = "http.server.active_requests"


def counts(registry: tapes.Registry) -> dict[tuple[str, str, str], int]:
    """Return the counts of requests by (method, route, status)."""
    found = {}
    for series in registry.snapshot().series(DURATION):
        labels = dict(series.labels)
        found[labels["method"], labels["route"], labels["status"]] = series.count
    return found


def active(registry: tapes.Registry) -> float:
    """Return the number of active requests."""
    return registry.snapshot().get(ACTIVE).value
