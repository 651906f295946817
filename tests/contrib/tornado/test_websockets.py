"""Websockets of Tornado."""

from __future__ import annotations

from tornado import websocket

from tests.contrib.recorded import DURATION, active, counts
from tests.contrib.tornado.handlers import app
from tests.contrib.tornado.server import serving


def test_websockets_are_counted_by_their_handshake(clock, registry):
    """A handshake is one request of status 101; an open websocket is neither active nor slow."""

    async def scenario(client):
        connection = await websocket.websocket_connect(f"ws://127.0.0.1:{client.port}/socket")
        await connection.write_message("a")
        assert await connection.read_message() == "a"
        assert active(registry) == 0
        assert counts(registry) == {("GET", "/socket", "101"): 1}
        clock.advance(60)
        await connection.write_message("b")
        assert await connection.read_message() == "b"
        connection.close()
        assert await connection.read_message() is None
        await client.fetch("/socket")

    serving(app(registry), scenario)
    assert counts(registry) == {("GET", "/socket", "101"): 1, ("GET", "/socket", "400"): 1}
    assert {series.sum for series in registry.snapshot().series(DURATION)} == {0.0}
    assert active(registry) == 0
