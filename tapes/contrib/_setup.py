"""How an adapter checks its setup. It logs each problem once: requests whose route it never sees, a route of
the application that it hides, another adapter that measures the same requests.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from tapes.contrib._applications import Application
from tapes.once import OnceLogger

_MAX_UNROUTED = 100  # maximum number of answers of status 200 in a row without a route before it is logged

_log = logging.getLogger("tapes.contrib")
_adapters: WeakKeyDictionary[Any, WeakSet[Setup]] = WeakKeyDictionary()  # by their gauge of active requests


class Setup:
    """The part of an adapter that looks at what is around it.

    Attributes:
        is_shared: Whether another adapter of this process has the same metrics, so that one may be within the
            other. Only then does the adapter leave an exchange in the environ or the scope, under ``key``.
        unrouted_left: Number of further answers of status 200 without a route before the adapter logs it.
        has_seen_routes: Whether a request with a route was looked up since the last one without.
    """

    timers: dict[Any, Any]
    metrics_paths: frozenset[str]

    def watch_setup(self, active: Any, application: Application, *, expects_routes: bool) -> None:
        """Begin to check; ``active`` is the gauge of active requests."""
        self.application = application
        self.unrouted_left = _MAX_UNROUTED if expects_routes else 0
        self.has_seen_routes = self.is_shared = self._has_looked = False
        self.key = f"tapes.exchange.{id(active)}"
        self._once = OnceLogger(_log)
        others = _adapters.setdefault(active, WeakSet())
        others.add(self)
        for adapter in list(others) if len(others) > 1 else ():
            adapter.is_shared = True

    def mark_requests_above(self, call: Any) -> None:
        """Leave the exchanges of outer adapters, if a request that they measure makes this inner one.

        Starlette makes its middleware at the first request if there was no lifespan before. ``call`` is the
        method of outer adapters that answers requests, with a local variable ``exchange``.
        """
        frame: Any = sys._getframe() if self.is_shared else None
        while frame is not None:
            exchange: Any = frame.f_locals.get("exchange") if frame.f_code is call.__code__ else None
            if getattr(exchange, "adapter", None) is not None:  # else it does not measure its request
                exchange.source[exchange.adapter.key] = exchange
            frame = frame.f_back

    def log_once(self, what: str, error: Exception) -> None:
        """Log ``what``, once for each kind of ``error``."""
        self._once.warning((what, type(error)), "%s (logged once): %r", what, error, exc_info=error)

    def note_unrouted(self, status: str | int) -> None:
        """Count an answer without a route. Log once if `_MAX_UNROUTED` in a row of status 200 had none."""
        if str(status) != "200":
            return
        if self.has_seen_routes or self.unrouted_left == _MAX_UNROUTED:
            # A request with a route is seen only if its timer is not in ``timers``, so empty that.
            self.timers.clear()
            self.has_seen_routes, self.unrouted_left = False, _MAX_UNROUTED
        self.unrouted_left -= 1
        if self.unrouted_left == 0:
            _log.warning(
                "tapes: %d answers of status 200 in a row have route=<unmatched>, as the adapter can't find "
                "the route that matched. Give it a route= callable that returns the template, or put it "
                "inside the middleware that passes on a copy of the environ or the scope (logged once)",
                _MAX_UNROUTED,
            )

    def look_for_own_route(self) -> None:
        """Log once if the application has a route of its own at the path of the metrics."""
        if self._has_looked or not self.metrics_paths:
            return
        self._has_looked = True
        try:
            if self.has_own_route():
                _log.warning(
                    "tapes: the application has a route for %s, but the adapter answers there, so that route "
                    "gets no requests. Give the adapter another metrics_path, or metrics_path=None",
                    min(self.metrics_paths, key=len),
                )
        except Exception:
            _log.debug("tapes can't look at the routes of the application", exc_info=True)

    def has_own_route(self) -> bool:
        return self.application.has_route(self.metrics_paths)

    def is_within(self, source: MutableMapping[str, Any], exchange: Any) -> bool:
        """Return whether an outer adapter with the same metrics measures this request; log it once.

        If there is none, leave ``exchange`` for adapters within this one.
        """
        outer = source.get(self.key)
        if outer is None or outer.adapter is None or not _is_same_request(outer.source, source):
            source[self.key] = exchange
            return False
        self._once.warning(
            "inner",
            "tapes: two adapters with the same metrics are around one application. The outer one records "
            "its requests, with its own options, and the inner one does not. Remove one of them, or give "
            "one another registry or prefix (logged once)",
        )
        return True


def _is_same_request(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two environs or scopes belong to one request, and not to a part of a batch within it."""
    return one is other or _method_and_path(one) == _method_and_path(other)


def _method_and_path(source: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the method and the whole path of a request: a mount moves a part of the path elsewhere."""
    if "REQUEST_METHOD" in source:
        return source["REQUEST_METHOD"], source.get("SCRIPT_NAME", "") + source.get("PATH_INFO", "")
    root, path = source.get("root_path", ""), source.get("path", "")
    return source.get("method"), path if path.startswith(root) else root + path
