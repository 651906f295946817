"""What the adapters of all frameworks share: how a request is named, and what is recorded of it.

The names are those of the OpenTelemetry HTTP semantic conventions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from tapes.errors import TapesError
from tapes.metrics import Timer
from tapes.naming import label_text
from tapes.registry import Registry, default_registry

__all__ = ["METHODS", "UNMATCHED", "RequestMetrics", "paths_of"]

UNMATCHED = "<unmatched>"
"""The route of what matches none."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
"""Methods by their own name; all others are ``_OTHER``, as a client can invent any number of them."""

_log = logging.getLogger("tapes.contrib")

_DURATION = "http.server.request.duration"
_ACTIVE = "http.server.active_requests"
_REQUEST_SIZE = "http.server.request.body.size"
_RESPONSE_SIZE = "http.server.response.body.size"

_Key = tuple[str, str, str, tuple[tuple[str, str], ...]]


class RequestMetrics:
    """Records requests into a registry; metrics are looked up once per method, route and status.

    Args:
        registry: Where to; the default registry if ``None``.
        prefix: Put before the names, with a dot.
        body_sizes: Whether sizes of bodies are recorded too.
    """

    def __init__(
        self, registry: Registry | None = None, *, prefix: str = "", body_sizes: bool = False
    ) -> None:
        self.registry = default_registry if registry is None else registry
        self.body_sizes = body_sizes
        before = f"{prefix}." if prefix else ""
        self._duration = before + _DURATION
        self._request_size = before + _REQUEST_SIZE
        self._response_size = before + _RESPONSE_SIZE
        self._timers: dict[_Key, Timer] = {}
        self.active = self.registry.gauge(before + _ACTIVE)
        describe = self.registry.describe
        describe(self._duration, "Duration of HTTP requests, to the last byte of the answer.")
        describe(before + _ACTIVE, "HTTP requests that are being answered.")
        if body_sizes:
            describe(self._request_size, "Size of HTTP request bodies.", unit="bytes")
            describe(self._response_size, "Size of HTTP response bodies.", unit="bytes")

    def record(
        self,
        method: str,
        route: str,
        status: str,
        seconds: float,
        now: float,
        labels: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the duration of a request that ended at ``now`` on the registry's clock.

        What the labels of the user spoil is recorded without them.
        """
        try:
            self._timer(method, route, status, labels).record(seconds, now)
        except TapesError as error:
            self._complain(str(error))
            self._timer(method, route, status, None).record(seconds, now)

    def _timer(self, method: str, route: str, status: str, labels: Mapping[str, Any] | None) -> Timer:
        more = tuple([(name, label_text(value)) for name, value in labels.items()]) if labels else ()
        key = (method, route, status, more)
        timer = self._timers.get(key)
        if timer is None:
            series = {**dict(more), "method": _known(method), "route": route, "status": status}
            timer = self.registry.timer(self._duration, labels=series)
            if method in METHODS and dict(timer.labels).get("overflow") is None:
                self._timers[key] = timer
        return timer

    @staticmethod
    @lru_cache(maxsize=64)
    def _complain(what: str) -> None:
        """Log, once for each complaint."""
        _log.warning("tapes records requests without further labels: %s", what)

    def request_ended(self) -> None:
        """Publish what was recorded, where no thread does."""
        try:
            connection = self.registry.connection
            told = connection is not None and connection.request_ended()
            if not told and self.registry.say_late_words is not None:
                self.registry.say_late_words()
        except Exception:
            _log.exception("tapes could not publish at the end of a request")

    def record_sizes(self, method: str, route: str, received: int, sent: int) -> None:
        """Record the sizes of a request's and its answer's body, in bytes."""
        labels = {"method": _known(method), "route": route}
        self.registry.histogram(self._request_size, labels=labels).update(received)
        self.registry.histogram(self._response_size, labels=labels).update(sent)


def _known(method: str) -> str:
    return method if method in METHODS else "_OTHER"


def paths_of(paths: str | Iterable[str] | None) -> frozenset[str]:
    """Return ``paths`` with and without a trailing slash; empty for ``None``."""
    if paths is None:
        return frozenset()
    each = [paths] if isinstance(paths, str) else paths
    return frozenset(form for path in each for form in (path.rstrip("/"), path.rstrip("/") + "/"))
