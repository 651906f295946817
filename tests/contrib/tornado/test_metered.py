"""MeteredHandler: the metrics of each class of handlers."""

from __future__ import annotations

import pytest
from tornado import web, websocket
from tornado.httputil import HTTPServerRequest

import tapes
from tapes.contrib.tornado import MeteredHandler, instrument
from tests.contrib.recorded import active, counts
from tests.contrib.tornado.handlers import (
    Broken,
    BrokenLater,
    Chunks,
    Decorated,
    Echo,
    Hello,
    Later,
    Overriding,
    Refusing,
)
from tests.contrib.tornado.server import fetching, serving, until


def endpoint(name):
    """Return the count of latencies and of errors of a class of handlers."""
    snapshot = tapes.default_registry.snapshot()
    latency = snapshot.get(f"http.endpoints.{name}.latency")
    return latency.count, snapshot.get(f"http.endpoints.{name}.error_rate").count


@pytest.mark.parametrize("is_instrumented", [False, True])
def test_every_metered_class_has_metrics_of_its_own(registry, is_instrumented):
    """Each subclass has its own metrics, for coroutines, streams, exceptions, and with instrument() too."""
    suffix = "Both" if is_instrumented else "Alone"

    def metered(name, base, **more):
        return type(MeteredHandler)(name + suffix, (MeteredHandler, base), {**vars_of(base), **more})

    def vars_of(base):
        return {name: value for name, value in vars(base).items() if not name.startswith("__")}

    classes = {
        f"/{base.__name__}": metered(f"Metered{base.__name__}", base)
        for base in (Hello, Later, Decorated, Chunks, Broken, BrokenLater, Refusing, Overriding)
    }
    child = type(MeteredHandler)("Child" + suffix, (classes["/Hello"],), {})
    application = web.Application([*classes.items(), ("/child", child)])
    if is_instrumented:
        instrument(application, registry)
    fetching(application, *[("GET", path) for path in [*classes, "/child", "/Hello"]])
    assert {path: endpoint(cls.__name__) for path, cls in [*classes.items(), ("/child", child)]} == {
        "/Hello": (2, 0), "/Later": (1, 0), "/Decorated": (1, 0), "/Chunks": (1, 0), "/Broken": (1, 1),
        "/BrokenLater": (1, 1), "/Refusing": (1, 0), "/Overriding": (1, 0), "/child": (1, 0),
    }  # fmt: skip
    assert classes["/Hello"].latency is not child.latency
    if is_instrumented:
        assert sum(counts(registry).values()) == 10
        assert active(registry) == 0


def test_the_base_of_metered_handlers_shows_nothing():
    """MeteredHandler itself records nothing, so its own metrics are not shown."""
    names = {family.name for family in tapes.default_registry.snapshot()}
    assert not any(name.startswith("http.endpoints.MeteredHandler.") for name in names)


def test_metered_requests_end_with_the_last_byte_or_the_client(monkeypatch):
    """Streams are timed to their end, websockets to the handshake, uploads to the client that goes away."""
    seconds = tapes.testing.ManualClock(tapes.default_registry.clock())
    monkeypatch.setattr(tapes.default_registry, "clock", seconds)
    monkeypatch.setattr(HTTPServerRequest, "request_time", lambda self: 3.0)  # when the handler is made

    class TimedEndpoint(MeteredHandler):
        async def get(self):
            for _ in range(4):
                seconds.advance(2.0)
                self.write("x")
                await self.flush()

    class SocketEndpoint(MeteredHandler, Echo):
        pass

    @web.stream_request_body
    class UploadEndpoint(MeteredHandler):
        closed = 0

        def data_received(self, chunk):
            pass

        def on_connection_close(self):
            UploadEndpoint.closed += 1

    async def scenario(client):
        await client.fetch("/")
        connection = await websocket.websocket_connect(f"ws://127.0.0.1:{client.port}/socket")
        await connection.write_message("a")
        assert await connection.read_message() == "a"
        assert endpoint("SocketEndpoint") == (1, 0)
        seconds.advance(60)
        connection.close()
        assert await connection.read_message() is None
        _, writer = await client.connect(b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf")
        writer.close()
        await until(lambda: UploadEndpoint.closed, "the handler notices it")
        assert endpoint("UploadEndpoint") == (1, 0)

    serving(
        web.Application([("/", TimedEndpoint), ("/socket", SocketEndpoint), ("/up", UploadEndpoint)]),
        scenario,
    )
    timed = tapes.default_registry.snapshot().get("http.endpoints.TimedEndpoint.latency")
    assert (timed.count, timed.sum) == (1, 11.0)
    assert endpoint("SocketEndpoint") == (1, 0)
