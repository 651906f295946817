"""What is recorded of websockets, from the end of their handshake. The handshake itself is a request."""

from __future__ import annotations

import logging
from typing import Any

from tapes.errors import TapesError
from tapes.naming import label_text
from tapes.registry import Registry

_log = logging.getLogger("tapes.contrib")

_ACTIVE = "websocket.server.active_connections"
_DURATION = "websocket.server.connection.duration"
_MESSAGES = "websocket.server.messages"

_STANDARD_CODES = frozenset(range(1000, 1016))


class WebSocketMetrics:
    """Records websockets into ``registry``, under names that begin with ``prefix``."""

    def __init__(self, registry: Registry, prefix: str = "") -> None:
        self.registry = registry
        self._before = f"{prefix}." if prefix else ""
        describe = registry.describe
        describe(self._before + _ACTIVE, "Websockets that are open.")
        describe(self._before + _DURATION, "How long websockets were open.")
        describe(self._before + _MESSAGES, "Messages of websockets, received and sent.")

    def opened(self, route: str) -> OpenConnection | None:
        """Return a connection that is open from now on; ``None`` if it can't be recorded."""
        try:
            return OpenConnection(self.registry, self._before, label_text(route))
        except TapesError as error:  # the application's own metrics have these names
            _log.warning("tapes can't record websockets: %s", error)
            return None


class OpenConnection:
    """A websocket that is open. Closing it twice is harmless."""

    __slots__ = ("_active", "_before", "_is_open", "_registry", "_route", "_start", "received", "sent")

    def __init__(self, registry: Registry, before: str, route: str) -> None:
        self._registry = registry
        self._before = before
        self._route = route
        messages = before + _MESSAGES
        self.received = registry.counter(messages, route=route, direction="received").increment
        self.sent = registry.counter(messages, route=route, direction="sent").increment
        self._active = registry.gauge(before + _ACTIVE)
        self._active.increment()
        self._is_open = True
        self._start = registry.clock()

    def close(self, code: Any, by_client: bool = False) -> None:
        """Record its end. A client can invent codes, so only the standard ones of a client are recorded."""
        if self._is_open:
            self._is_open = False
            self._active.decrement()
            label = "_OTHER" if by_client and code not in _STANDARD_CODES else label_text(code)
            timer = self._registry.timer(self._before + _DURATION, route=self._route, code=label)
            now = self._registry.clock()
            timer._record(now - self._start, now)
