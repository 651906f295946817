"""ASGI requests and websockets, from their call to their end, as seen in the messages.

The handshake of a websocket is a request; the connection after it has metrics of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tapes.contrib._http import ROUTE, UNMATCHED, Adapter, Exchange, is_complete, status_of
from tapes.contrib._routes import Templates
from tapes.contrib.options import Options
from tapes.errors import TapesError
from tapes.naming import label_text
from tapes.registry import Registry

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NOT_STARTED: Message = {}

# Stages of an answer.
SENDING = 0  # the end of the body is missing
_BODY_SENT = 1  # the server has taken the whole body, and trailers are missing
_LAST_SENT = 2  # the server has got the last message
_ENDED = 3  # after that, the server has reported the end of the exchange
_DISCONNECTED = 4  # before that, the server has reported the end: the client went away

_BODIES = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})

_ACTIVE = "websocket.server.active_connections"
_DURATION = "websocket.server.connection.duration"
_MESSAGES = "websocket.server.messages"
_STANDARD_CODES = frozenset(range(1000, 1016))

_log = logging.getLogger("tapes.contrib")


class ASGIAdapter(Adapter):
    """The metrics of an ASGI application, of its websockets too."""

    def __init__(self, registry: Registry | None, application: Any, options: Options) -> None:
        super().__init__(registry, application, options)
        self.templates = Templates()
        describe = self.registry.describe
        describe(self.before + _ACTIVE, "Websockets that are open.")
        describe(self.before + _DURATION, "How long websockets were open.")
        describe(self.before + _MESSAGES, "Messages of websockets, received and sent.")

    def opened(self, route: str) -> _Connection | None:
        """Return a websocket that is open from now on; ``None`` if it can't be recorded."""
        try:
            return _Connection(self.registry, self.before, label_text(route))
        except TapesError as error:  # the application's own metrics have these names
            _log.warning("tapes can't record websockets: %s", error)
            return None


class _Connection:
    """A websocket that is open. Closing it twice is harmless."""

    __slots__ = ("_active", "_before", "_is_open", "_registry", "_route", "_start", "received", "sent")

    def __init__(self, registry: Registry, before: str, route: str) -> None:
        self._registry, self._before, self._route = registry, before, route
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


class _Exchange(Exchange):
    """One request, or the handshake of a websocket."""

    __slots__ = ("answer", "inner_path", "root_path", "server_receive", "server_send", "stage", "status")
    adapter: ASGIAdapter | None
    answer: Message  # the message that started it
    inner_path: str  # the path below root_path
    root_path: str  # as the server had set it
    server_receive: Receive
    server_send: Send
    stage: int  # how far the answer is
    status: int

    def disconnected(self) -> None:
        """Note that the server reports the end of the exchange, which may come while it still writes."""
        if self.stage < _LAST_SENT:
            self.stage = _DISCONNECTED
        elif self.stage == _LAST_SENT:
            self.stage = _ENDED

    def fail(self, error: BaseException) -> None:
        if self.stage == _ENDED and not isinstance(error, Exception):
            self.end(self.status)
        else:
            self.end(self.status_if_gone() if self.stage == _DISCONNECTED else int(status_of(error)))

    def returned(self) -> None:
        if self.stage == _DISCONNECTED:
            self.end(self.status_if_gone())
        else:
            self.end(500 if self.stage == SENDING else self.status)

    def status_if_gone(self) -> int:
        """Return the status of an answer without its last message: 499, unless no byte was missing."""
        try:
            fields = self.answer.get("headers") or ()
            lengths = [value.decode() for name, value in fields if name.lower() == b"content-length"]
        except Exception:  # invalid headers, which the server has refused
            lengths = []
        is_whole = bool(self.answer) and is_complete(self.method, self.status, lengths, self.sent)
        return self.status if is_whole else 499

    def late_route(self, adapter: ASGIAdapter) -> str:
        scope = self.source
        route = adapter.templates.of(scope, self.root_path, self.inner_path) or scope.get(ROUTE)
        if route:
            return str(route)
        route = scope.get("path_template")  # of Litestar
        has_been_routed = "router" in scope and "endpoint" not in scope  # and no route matched
        if not route and adapter.application.may_have_routes and not has_been_routed:
            # Ask the framework, which finds the route a second time.
            route = adapter.application.route_of(scope, self.inner_path)
        return route or UNMATCHED


class Request(_Exchange):
    __slots__ = ()

    async def receive(self) -> Message:
        message = await self.server_receive()
        kind = message["type"]
        if kind == "http.disconnect":
            self.disconnected()
        elif kind == "http.request":
            self.received += len(message.get("body") or b"")
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.answer = message
            return self.server_send(message)
        return self._send(message)

    async def _send(self, message: Message) -> None:
        # 1. See whether it is the last one, before the server may report the end.
        kind = message["type"]
        is_last = False
        if kind in _BODIES:
            self.sent += len(message.get("body") or b"")
            if not message.get("more_body", False):
                is_last = not self.answer.get("trailers", False)
        elif kind == "http.response.trailers":
            is_last = not message.get("more_trailers", False)
        if is_last and self.stage < _LAST_SENT:
            self.stage = _LAST_SENT
        # 2. Pass it on.
        try:
            await self.server_send(message)
        except OSError:  # servers raise it when the client has gone
            self.stage, self.answer = _DISCONNECTED, NOT_STARTED  # so it is incomplete, whatever was counted
            raise
        # 3. End with the last one.
        if is_last:
            self.end(self.status_if_gone() if self.stage == _DISCONNECTED else self.status)
        elif kind in _BODIES and self.stage == SENDING and not message.get("more_body", False):
            self.stage = _BODY_SENT


class WebSocket(_Exchange):
    """One handshake of a websocket, and the connection after it."""

    __slots__ = ("_connection",)

    def __init__(self) -> None:
        self._connection: _Connection | None = None

    async def receive(self) -> Message:
        message = await self.server_receive()
        kind = message["type"]
        if kind == "websocket.receive" and self._connection is not None:
            self._connection.received()
        elif kind == "websocket.disconnect":
            self.disconnected()
            self._close(message.get("code", 1005), by_client=True)
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "websocket.send" and self._connection is not None:
            self._connection.sent()
            return self.server_send(message)
        return self._send(message)

    async def _send(self, message: Message) -> None:
        # 1. See whether it ends the handshake, before the server may report the end.
        kind = message["type"]
        is_last = kind == "websocket.http.response.body" and not message.get("more_body", False)
        if kind == "websocket.close":
            self.status = 403  # the status that the server sends if no acceptance came before
        if self.stage == SENDING and (is_last or kind == "websocket.close"):
            self.stage = _LAST_SENT
        # 2. Pass it on.
        await self.server_send(message)
        # 3. End the handshake, or the connection.
        if kind == "websocket.accept":
            adapter = self.adapter
            self.end(101)
            if adapter is not None:
                self._connection = adapter.opened(self.route or UNMATCHED)
        elif kind == "websocket.close":
            self.end(403)
            self._close(message.get("code", 1000))
        elif kind == "websocket.http.response.start":
            self.status = message["status"]
        elif is_last:
            self.end(self.status)

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._close(1011 if isinstance(error, Exception) else 1006)

    def returned(self) -> None:
        super().returned()
        self._close(1006)

    def _close(self, code: Any, by_client: bool = False) -> None:
        if self._connection is not None:
            self._connection.close(code, by_client)
