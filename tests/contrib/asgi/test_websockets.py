"""Websockets under ASGI: the handshake is a request, and the connection has metrics of its own."""

from __future__ import annotations

from functools import partial

import anyio
import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

import tapes
from tapes.contrib.asgi import TapesMiddleware
from tapes.testing import ManualClock
from tests.contrib.asgi.server import Answer, receiving, scope_of
from tests.contrib.recorded import active, counts


async def echo(websocket):
    await websocket.accept()
    async for message in websocket.iter_text():
        await websocket.send_text(message)
        await websocket.send_text(message)


async def denies(websocket):
    await websocket.close()


async def fails(websocket):
    await websocket.accept()
    raise RuntimeError("broken")


def open_socket(app, path, *messages):
    answer = Answer()
    scope = {**scope_of(path), "type": "websocket", "scheme": "ws"}
    del scope["method"]
    anyio.run(app, scope, receiving({"type": "websocket.connect"}, *messages), answer.send)
    return answer


def test_websockets_have_metrics_of_their_own():
    """Handshakes count as requests; durations by close code and messages by direction count apart."""
    clock = ManualClock(100.0)
    registry = tapes.Registry(clock=clock)
    routes = [WebSocketRoute("/echo/{room}", echo), WebSocketRoute("/denies", denies)]
    app = TapesMiddleware(Starlette(routes=[*routes, WebSocketRoute("/fails", fails)]), registry)
    text = {"type": "websocket.receive", "text": "x"}
    open_socket(app, "/echo/7", text, text, {"type": "websocket.disconnect", "code": 1001})
    open_socket(app, "/echo/8", {"type": "websocket.disconnect", "code": 4321})
    open_socket(app, "/denies")
    with pytest.raises(RuntimeError, match="broken"):
        open_socket(app, "/fails")
    assert counts(registry) == {
        ("GET", "/echo/{room}", "101"): 2,
        ("GET", "/fails", "101"): 1,
        ("GET", "/denies", "403"): 1,
    }
    snapshot = registry.snapshot()
    closed = {(dict(s.labels)["route"], dict(s.labels)["code"]): s.count
              for s in snapshot.series("websocket.server.connection.duration")}  # fmt: skip
    assert closed == {("/echo/{room}", "1001"): 1, ("/echo/{room}", "_OTHER"): 1, ("/fails", "1011"): 1}
    messages = partial(snapshot.get, "websocket.server.messages", route="/echo/{room}")
    assert (messages(direction="received").value, messages(direction="sent").value) == (2, 4)
    assert snapshot.get("websocket.server.active_connections").value == 0
    assert active(registry) == 0


def test_an_open_websocket_is_no_slow_request():
    """A websocket that is open for an hour is a request of 0 s and one active connection."""
    clock = ManualClock(100.0)
    registry = tapes.Registry(clock=clock)

    async def app(scope, receive, send):
        await send({"type": "websocket.accept"})
        clock.advance(3600.0)
        assert active(registry) == 0
        assert registry.snapshot().get("websocket.server.active_connections").value == 1
        (request,) = registry.snapshot().series("http.server.request.duration")
        assert request.sum == 0.0
        await send({"type": "websocket.close", "code": 4000})

    open_socket(TapesMiddleware(app, registry), "/")
    (connection,) = registry.snapshot().series("websocket.server.connection.duration")
    assert (dict(connection.labels)["code"], connection.sum) == ("4000", 3600.0)


def test_close_codes_that_clients_invent_make_one_series(registry):
    """500 close codes that are not standard are one series, ``_OTHER``."""
    app = TapesMiddleware(Starlette(routes=[WebSocketRoute("/", echo)]), registry)
    for code in range(3000, 3500):
        open_socket(app, "/", {"type": "websocket.disconnect", "code": code})
    (closed,) = registry.snapshot().series("websocket.server.connection.duration")
    assert (closed.count, dict(closed.labels)["code"]) == (500, "_OTHER")
