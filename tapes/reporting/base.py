"""What all reporters share."""

from __future__ import annotations

from tapes.registry import Registry, default_registry

__all__ = ["Reporter"]


class Reporter:
    """Writes the values of a registry somewhere.

    Args:
        registry: What to report; the default registry if ``None``. An aggregator replaces it by the merged
            view of all workers before it calls `start`.
    """

    def __init__(self, registry: Registry | None = None) -> None:
        self.registry = default_registry if registry is None else registry

    def start(self) -> None:
        """Begin to report; returns at once."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it, and release what it holds; nothing if it wasn't started."""
        raise NotImplementedError
