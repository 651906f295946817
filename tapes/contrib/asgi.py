"""Request metrics and ``/metrics`` for any ASGI application: Starlette, FastAPI, Litestar, bare ones.

    app = TapesMiddleware(app)                # or app.add_middleware(TapesMiddleware)

Pure ASGI 3: every message and every scope passes through as it is, on asyncio and on trio. A request is timed
from the call to the end of its last message, so background tasks are not part of it; exceptions are recorded
and raised on. A websocket's handshake is a request with status 101; its connection has metrics of its own.

The lifespan is used to join the other processes and to leave them. Where the application knows none, and
there are others to leave, it is answered here: right after it a server may end its process by a signal that
no other hook comes before, as uvicorn does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from itertools import islice
from typing import Any

from tapes.contrib._http import (
    ROUTE,
    UNMATCHED,
    UP_ONE,
    Adapter,
    Exchange,
    Guard,
    LabelsOf,
    RouteOf,
    is_complete,
    status_of,
)
from tapes.contrib._routes import Templates, path_below
from tapes.contrib._websocket import OpenConnection, WebSocketMetrics
from tapes.errors import MissingExtra
from tapes.exposition import MAX_CHARACTERS
from tapes.exposition.endpoint import MAX_READERS, Answer, plain, refusal
from tapes.registry import Registry

try:
    from anyio import CapacityLimiter, move_on_after
    from anyio.lowlevel import RunVar
    from anyio.to_thread import run_sync
except ModuleNotFoundError:
    raise MissingExtra("tapes.contrib.asgi", "asgi") from None

__all__ = ["ROUTE", "TapesMiddleware"]

_log = logging.getLogger("tapes.contrib")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


_readers: RunVar[CapacityLimiter | None] = RunVar("tapes readers")
_PATIENCE_SECONDS = 0.7
"""Maximum seconds for which a reader waits for a thread."""
_PIECE_BYTES = 1 << 18
"""Maximum bytes that are handed to the server at once; it keeps what the client has not taken."""


class TapesMiddleware:
    """Measures every request of an ASGI application, and answers ``/metrics`` for the whole service.

    Records the timer ``http.server.request.duration`` {method, route, status}, the gauge
    ``http.server.active_requests``, and for websockets ``websocket.server.active_connections``, the timer
    ``websocket.server.connection.duration`` {route, code} and the counter ``websocket.server.messages``
    {route, direction}. The route is the full template of Starlette and FastAPI, never the raw path; the
    status 499 is a client that went away. A process of several joins the others in the background when this
    is made. ``TAPES_DISABLED=1`` turns it off.

    Args:
        app: The ASGI application.
        registry: Where to record; the default registry if ``None``.
        metrics_path: Where the metrics are answered, with and without a trailing slash; ``None`` for
            nowhere.
        exclude: Paths that are not measured, with and without a trailing slash; ``"/static/*"`` is
            everything below.
        labels: Further labels: a dict, or a callable that takes the scope and returns one; it is called when
            the request ends.
        body_sizes: Record the sizes of bodies too, in bytes.
        guard: A callable that takes the scope and says who may read the metrics, asynchronous or not; the
            others get 403. Without one, ``TAPES_METRICS_TOKEN`` is asked for, if it is set.
        prefix: Put before the metrics' names, with a dot.
        route: A callable that takes the scope and returns the route's template, for applications whose
            framework is not known to this adapter.

    Raises:
        InvalidArgument: If an option can't be used.
    """

    def __init__(
        self,
        app: App,
        registry: Registry | None = None,
        *,
        metrics_path: str | None = "/metrics",
        exclude: Iterable[str] = (),
        labels: LabelsOf = None,
        body_sizes: bool = False,
        guard: Guard = None,
        prefix: str = "",
        route: RouteOf = None,
    ) -> None:
        self.app = app
        self._adapter = Adapter(
            registry, metrics_path=metrics_path, exclude=exclude, labels=labels, body_sizes=body_sizes,
            guard=guard, prefix=prefix, route=route, application=app,
        )  # fmt: skip
        self._service = self._adapter.service
        self._mark, self._is_off = self._service.mark, self._service.is_off
        self._websockets = WebSocketMetrics(self._adapter.registry, prefix)
        self._templates = Templates()
        self._adapter.mark_requests_above(TapesMiddleware.__call__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a connection, as ASGI 3 says."""
        kind = scope["type"]
        if not self._mark[0]:
            service = self._service
            if kind != "lifespan":  # in which routes may be added
                self._adapter.look_for_own_route()
            if service.begin():
                # It may wait for an aggregator to start: the event loop has other things to do.
                await run_sync(service.join, limiter=CapacityLimiter(1))
        if kind != "http" and kind != "websocket":
            await (self._live if kind == "lifespan" else self.app)(scope, receive, send)
            return
        whole_path = scope.get("path", "")
        root_path = scope.get("root_path", "")
        path = path_below(whole_path, root_path) if root_path else whole_path
        adapter = self._adapter
        if path in adapter.own_paths or (adapter.excluded_below and adapter.leaves_out(path)):
            if path in adapter.metrics_paths and kind == "http":
                await self._answer(scope, send)
            else:
                await self.app(scope, receive, send)
            return
        exchange: _Exchange = _Request() if kind == "http" else _WebSocket()
        if self._is_off or (adapter.is_shared and adapter.is_within(scope, exchange)):
            await self.app(scope, receive, send)
            return
        exchange.adapter = adapter
        exchange.source = scope
        exchange.method = scope.get("method", "GET")
        exchange.route = UNMATCHED
        exchange.received = exchange.sent = 0
        exchange._middleware = self
        exchange._path = path
        exchange._root_path = root_path
        exchange._receive = receive
        exchange._send = send
        exchange._status = 500
        exchange._stage = _OPEN
        exchange._answer = _NOT_STARTED
        adapter.active._buffer.append(UP_ONE)
        exchange.start = adapter.clock()
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except BaseException as error:
            exchange.fail(error)
            raise
        exchange.returned()

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_member = self._service.is_member or self._adapter.registry.connection is not None
        is_known = not is_member  # if it is none, there is no service to leave

        async def receiving() -> Message:
            nonlocal is_known
            is_known = True
            return await receive()

        async def sending(message: Message) -> None:
            nonlocal is_known
            is_known = True
            if message["type"] == "lifespan.startup.complete":
                self._adapter.look_for_own_route()
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                self._service.leave()  # the process may end right after it
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except Exception:
            if is_known:
                raise
            _log.debug("the application knows no lifespan: tapes answers it", exc_info=True)
        if not is_known:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await sending({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, send: Send) -> None:
        self._adapter.look_for_own_route()
        headers = list(islice(scope.get("headers", ()), _MAX_LINES))
        allowed = await self._adapter.is_allowed_later(scope)
        answer = refusal(scope.get("method", ""), _field(headers, b"authorization"), allowed)
        if answer is None:
            accept = _field(headers, b"accept", MAX_CHARACTERS + 1)  # one more shows that it is cut
            query = scope.get("query_string", b"").decode("latin-1")
            answer = await self._read(accept, query)
        status, fields, body = answer
        fields["Content-Length"] = str(len(body))
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        if scope.get("method") == "HEAD":
            body = b""
        for start in range(0, max(1, len(body)), _PIECE_BYTES):
            end = start + _PIECE_BYTES
            message = {"type": "http.response.body", "body": body[start:end], "more_body": end < len(body)}
            await send(message)

    async def _read(self, accept: str, query: str) -> Answer:
        """Return the metrics; it may wait for the aggregator, and as long for a thread.

        The application's own threads are not taken for it.
        """
        limiter = _readers.get(None)
        if limiter is None:  # there is one for each event loop
            limiter = CapacityLimiter(MAX_READERS)
            _readers.set(limiter)
        with move_on_after(_PATIENCE_SECONDS):  # what has begun is awaited
            return await run_sync(self._service.answer, accept, query, limiter=limiter)
        return plain(503, f"This process answers {MAX_READERS} readers already; ask again in a second.")


def _field(headers: list[tuple[bytes, bytes]], name: bytes, most: int | None = None) -> str:
    """Return the value of a header, and of each line no more than ``most`` bytes.

    Several lines of one name are one list (RFC 9110, section 5.3).
    """
    return b", ".join([value[:most] for key, value in headers if key.lower() == name]).decode("latin-1")


_MAX_LINES = 1000  # maximum number of header lines of a request for the metrics that are looked at


_NOT_STARTED: Message = {}

_OPEN = 0  # the end of the body is missing
_BODY = 1  # the server has taken the whole body, and trailers are missing
_OVER = 2  # the last message was handed to the server
_TAKEN = 3  # after that, the server has reported the end of the exchange
_GONE = 4  # before that, the server has reported the end: the client went away


class _Exchange(Exchange):
    """One request, or the handshake of a websocket.

    Attributes:
        _answer: The message that started the answer.
        _stage: How far the answer is: `_OPEN`, `_BODY`, `_OVER`, `_TAKEN` or `_GONE`.
    """

    __slots__ = (
        "_answer", "_middleware", "_path", "_receive", "_root_path", "_send", "_stage", "_status",
    )  # fmt: skip
    _answer: Message
    _path: str
    _middleware: TapesMiddleware
    _receive: Receive
    _root_path: str
    _send: Send
    _stage: int
    _status: int

    async def receive(self) -> Message:
        raise NotImplementedError

    def send(self, message: Message) -> Awaitable[None]:
        raise NotImplementedError

    def disconnected(self) -> None:
        """Note that the server reports the end of the exchange, which may come while it still writes."""
        if self._stage < _OVER:
            self._stage = _GONE
        elif self._stage == _OVER:
            self._stage = _TAKEN

    def fail(self, error: BaseException) -> None:
        """End by ``error``."""
        if self._stage == _TAKEN and not isinstance(error, Exception):
            self.end(self._status)
        else:
            self.end(self.status_if_gone() if self._stage == _GONE else int(status_of(error)))

    def returned(self) -> None:
        """End as the application has returned, if the answer hasn't ended before."""
        if self._stage == _GONE:
            self.end(self.status_if_gone())
        else:
            self.end(500 if self._stage == _OPEN else self._status)

    def status_if_gone(self) -> int:
        """Return the status of an answer without its last message: 499, unless nothing was missing."""
        try:
            fields = self._answer.get("headers") or ()
            lengths = [value.decode() for name, value in fields if name.lower() == b"content-length"]
        except Exception:  # no headers, which the server has refused
            lengths = []
        is_whole = bool(self._answer) and is_complete(self.method, self._status, lengths, self.sent)
        return self._status if is_whole else 499

    def late_route(self, adapter: Adapter) -> str:
        scope = self.source
        route = self._middleware._templates.of(scope, self._root_path, self._path) or scope.get(ROUTE)
        if route:
            return str(route)
        route = scope.get("path_template")  # of Litestar
        has_been_routed = "router" in scope and "endpoint" not in scope  # and no route matched
        if not route and adapter.application.may_have_routes and not has_been_routed:
            # This costs what the framework takes to find a route.
            route = adapter.application.route_of(scope, self._path)
        return route or UNMATCHED


class _Request(_Exchange):
    __slots__ = ()

    async def receive(self) -> Message:
        message = await self._receive()
        kind = message["type"]
        if kind == "http.disconnect":
            self.disconnected()
        elif kind == "http.request":
            self.received += len(message.get("body") or b"")
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._answer = message
            return self._send(message)
        return self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        kind = message["type"]
        is_last = False
        if kind in _BODIES:
            self.sent += len(message.get("body") or b"")
            if not message.get("more_body", False):
                is_last = not self._answer.get("trailers", False)
        elif kind == "http.response.trailers":
            is_last = not message.get("more_trailers", False)
        if is_last and self._stage < _OVER:
            self._stage = _OVER
        try:
            await self._send(message)
        except OSError:  # what servers raise when there is no client any more
            self._stage, self._answer = _GONE, _NOT_STARTED  # so it is not complete, whatever was counted
            raise
        if is_last:
            self.end(self.status_if_gone() if self._stage == _GONE else self._status)
        elif kind in _BODIES and self._stage == _OPEN and not message.get("more_body", False):
            self._stage = _BODY


_BODIES = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})


class _WebSocket(_Exchange):
    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: OpenConnection | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        kind = message["type"]
        if kind == "websocket.receive" and self._open is not None:
            self._open.received()
        elif kind == "websocket.disconnect":
            self.disconnected()
            self._close(message.get("code", 1005), by_client=True)
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "websocket.send" and self._open is not None:
            self._open.sent()
            return self._send(message)
        return self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        kind = message["type"]
        is_last = kind == "websocket.http.response.body" and not message.get("more_body", False)
        if kind == "websocket.close":
            self._status = 403  # what a server makes of it, if it comes instead of an acceptance
        if self._stage == _OPEN and (is_last or kind == "websocket.close"):
            self._stage = _OVER
        await self._send(message)
        if kind == "websocket.accept":
            self.end(101)
            self._open = self._middleware._websockets.opened(self.route or UNMATCHED)
        elif kind == "websocket.close":
            self.end(403)
            self._close(message.get("code", 1000))
        elif kind == "websocket.http.response.start":
            self._status = message["status"]
        elif is_last:
            self.end(self._status)

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._close(1011 if isinstance(error, Exception) else 1006)

    def returned(self) -> None:
        super().returned()
        self._close(1006)

    def _close(self, code: Any, by_client: bool = False) -> None:
        if self._open is not None:
            self._open.close(code, by_client)
