"""Request metrics and ``/metrics`` for any ASGI application: Starlette, FastAPI, Litestar, bare ones.

    app = TapesMiddleware(app)                # or app.add_middleware(TapesMiddleware)

Pure ASGI 3: every message and every scope passes through unchanged, on asyncio and on trio. A request is
timed from the call to the end of its last message, without background tasks; exceptions are recorded and
raised again. A websocket's handshake is a request with status 101; its connection has metrics of its own.

A worker joins its service at the latest when the lifespan starts, and leaves it when the lifespan ends. If
the application does not support the lifespan, and there is a service to leave, the middleware answers it:
right after the lifespan a server may end its process by a signal that runs no other hook, as uvicorn does.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Unpack

from tapes.contrib import _asgi
from tapes.contrib._asgi import NOT_STARTED, SENDING, ASGIAdapter, Request, WebSocket
from tapes.contrib._http import ROUTE, UNMATCHED, may_read
from tapes.contrib._routes import path_below
from tapes.contrib.options import Options, with_options
from tapes.errors import MissingExtra
from tapes.exposition import MAX_CHARACTERS
from tapes.exposition.endpoint import MAX_READERS, Answer, plain, refusal
from tapes.metrics.gauge import UP_ONE
from tapes.registry import Registry

try:
    from anyio import CapacityLimiter, move_on_after
    from anyio.lowlevel import RunVar
    from anyio.to_thread import run_sync
except ModuleNotFoundError:
    raise MissingExtra("tapes.contrib.asgi", "asgi") from None

__all__ = ["ROUTE", "TapesMiddleware"]

_log = logging.getLogger("tapes.contrib")
_readers: RunVar[CapacityLimiter | None] = RunVar("tapes readers")

_MAX_HEADER_LINES = 1000  # maximum number of header lines that are read of a request for the metrics
_PATIENCE_SECONDS = 0.7  # maximum seconds for which a reader waits for a thread
_PIECE_BYTES = 1 << 18  # maximum bytes that the server gets at once, as it keeps what is not yet sent


class TapesMiddleware:
    """Measures every request of an ASGI application, and answers ``/metrics`` for the whole service.

    Records the timer ``http.server.request.duration`` {method, route, status}, the gauge
    ``http.server.active_requests``, and for websockets ``websocket.server.active_connections``, the timer
    ``websocket.server.connection.duration`` {route, code} and the counter ``websocket.server.messages``
    {route, direction}. The route is the full template of Starlette and FastAPI, never the raw path; the
    status 499 is a client that went away. A worker process joins its service in the background when this is
    made. ``TAPES_DISABLED=1`` turns it off.

    Args:
        app: The ASGI application.
        registry: Where to record; the default registry if ``None``.
        options: ``metrics_path``, ``exclude``, ``labels``, ``body_sizes``, ``guard``, ``prefix``, ``route``;
            `tapes.contrib.options.Options` describes them.

    Raises:
        InvalidArgument, InvalidCall: If an option is out of its range, or does not exist.
    """

    @with_options
    def __init__(self, app: _asgi.App, registry: Registry | None = None, **options: Unpack[Options]) -> None:
        self.app = app
        self._adapter = ASGIAdapter(registry, app, options)
        self._service = self._adapter.service
        self._mark, self._is_off = self._service.mark, self._service.is_off
        self._adapter.mark_requests_above(TapesMiddleware.__call__)

    async def __call__(self, scope: _asgi.Scope, receive: _asgi.Receive, send: _asgi.Send) -> None:
        """Answer a connection, as ASGI 3 defines it."""
        # 1. Connections that are not measured.
        kind = scope["type"]
        if not self._mark[0]:
            await self._begin(kind)
        if kind != "http" and kind != "websocket":
            await (self._lifespan if kind == "lifespan" else self.app)(scope, receive, send)
            return
        whole_path, root_path = scope.get("path", ""), scope.get("root_path", "")
        path = path_below(whole_path, root_path) if root_path else whole_path
        adapter = self._adapter
        if path in adapter.own_paths or (adapter.excluded_below and adapter.leaves_out(path)):
            is_reader = path in adapter.metrics_paths and kind == "http"
            await (self._answer(scope, send) if is_reader else self.app(scope, receive, send))
            return
        exchange: Request | WebSocket = Request() if kind == "http" else WebSocket()
        if self._is_off or (adapter.is_shared and adapter.is_within(scope, exchange)):
            await self.app(scope, receive, send)
            return
        # 2. Begin to measure. An __init__() would be one more call in each request.
        exchange.adapter, exchange.source = adapter, scope
        exchange.method, exchange.route = scope.get("method", "GET"), UNMATCHED
        exchange.received = exchange.sent = 0
        exchange.inner_path, exchange.root_path = path, root_path
        exchange.server_receive, exchange.server_send = receive, send
        exchange.status, exchange.stage = 500, SENDING
        exchange.answer = NOT_STARTED
        adapter.active._buffer.append(UP_ONE)
        exchange.start = adapter.clock()
        # 3. Call the application.
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except BaseException as error:
            exchange.fail(error)
            raise
        exchange.returned()

    async def _begin(self, kind: str) -> None:
        """Join the service, if this process has to."""
        if kind != "lifespan":  # in which routes may be added
            self._adapter.look_for_own_route()
        if self._service.begin():
            # It may wait for an aggregator to start, which must not block the event loop.
            await run_sync(self._service.join, limiter=CapacityLimiter(1))

    async def _lifespan(self, scope: _asgi.Scope, receive: _asgi.Receive, send: _asgi.Send) -> None:
        is_member = self._service.is_member or self._adapter.registry.session.resolved().is_connected
        is_supported = not is_member  # without a service to leave, the lifespan is left to the application

        async def receiving() -> _asgi.Message:
            nonlocal is_supported
            is_supported = True
            return await receive()

        async def sending(message: _asgi.Message) -> None:
            nonlocal is_supported
            is_supported = True
            if message["type"] == "lifespan.startup.complete":
                self._adapter.look_for_own_route()
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                self._service.leave()  # the process may end right after it
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except Exception:
            if is_supported:
                raise
            _log.debug("the application does not support the lifespan: tapes answers it", exc_info=True)
        if not is_supported:
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await sending({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: _asgi.Scope, send: _asgi.Send) -> None:
        adapter = self._adapter
        adapter.look_for_own_route()
        headers = list(islice(scope.get("headers", ()), _MAX_HEADER_LINES))
        allowed = await may_read(adapter.guard, scope, adapter.log_once)
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
        """Return the metrics. May wait for a thread, of which tapes has its own, and for the aggregator."""
        limiter = _readers.get(None)
        if limiter is None:  # each event loop has one
            limiter = CapacityLimiter(MAX_READERS)
            _readers.set(limiter)
        with move_on_after(_PATIENCE_SECONDS):  # once a thread has begun, it is awaited
            return await run_sync(self._service.answer, accept, query, limiter=limiter)
        return plain(503, f"This process answers {MAX_READERS} readers already; ask again in a second.")


def _field(headers: list[tuple[bytes, bytes]], name: bytes, most: int | None = None) -> str:
    """Return the value of a header, at most ``most`` bytes of each line."""
    # Several lines of one name are one list (RFC 9110, section 5.3).
    return b", ".join([value[:most] for key, value in headers if key.lower() == name]).decode("latin-1")
