"""When a request of Tornado ends, and with which status."""

from __future__ import annotations

import asyncio
import gc

import pytest
import tornado
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.testing import bind_unused_port

from tests.contrib.recorded import active, counts
from tests.contrib.tornado.handlers import Hello, app
from tests.contrib.tornado.server import Client, fetching, serving, until


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/later", 200), ("/decorated", 200), ("/broken", 500), ("/refusing", 409), ("/finishing", 410),
        ("/chunks", 200), ("/broken-later", 500), ("/finishing-later", 200),
        (r"/price$", 200), ("/overriding", 200), ("/moved", 301),
    ],
)  # fmt: skip
def test_every_kind_of_handler_is_counted_once(registry, path, status):
    """Coroutines, exceptions, Finish, streams and handlers that call no super() are each counted once."""
    fetching(app(registry), ("GET", path), ("GET", path))
    assert counts(registry) == {("GET", path.replace("$", r"\$"), str(status)): 2}
    assert active(registry) == 0


@pytest.mark.parametrize(("path", "status"), [("/unmade", "500"), ("/bad-header", "500"), ("/gone", "499")])
def test_what_can_not_be_answered(registry, path, status):
    """A handler that can't be made and invalid headers are 500, a client that has gone is 499."""

    async def scenario(client):
        assert await client.raw(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()) == b""

    serving(app(registry), scenario)
    assert counts(registry) == {("GET", path, status): 1}
    assert active(registry) == 0


def test_a_hundred_requests_on_one_connection(registry):
    """Each of 100 requests that are pipelined on one connection is counted."""

    async def scenario(client):
        one = b"GET /users/7 HTTP/1.1\r\nHost: a\r\n\r\n"
        last = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        assert (await client.raw(one * 99 + last)).count(b"HTTP/1.1 200 OK") == 100

    serving(app(registry), scenario)
    assert counts(registry) == {("GET", r"/users/(\d+)", "200"): 100}
    assert active(registry) == 0


def test_a_client_that_goes_away_is_a_499(registry):
    """A client that goes away is counted once and at once, and the handler's own callback is called."""
    seen = []

    class Endless(web.RequestHandler):
        async def get(self):
            self.gone = asyncio.Event()
            self.write("x")
            await self.flush()
            await self.gone.wait()
            seen.append((active(registry), counts(registry)))

        def on_connection_close(self):
            seen.append("closed")
            asyncio.get_running_loop().call_soon(self.gone.set)

    async def scenario(client):
        reader, writer = await client.connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"x")
        assert active(registry) == 1
        writer.close()
        await until(lambda: len(seen) == 2, "the handler has noticed it")

    serving(app(registry, [("/", Endless)]), scenario)
    expected = {("GET", "/", "499"): 1}
    assert seen == ["closed", (0, expected)]
    assert counts(registry) == expected  # and not once more when the handler finished


def test_a_client_that_has_got_all_may_go(registry):
    """A client that goes away after the whole answer leaves its status, though the handler goes on."""

    class Complete(web.RequestHandler):
        async def get(self):
            self.gone = asyncio.Event()
            self.set_header("Content-Length", "1")
            self.write("x")
            await self.flush()
            await self.gone.wait()

        def on_connection_close(self):
            self.gone.set()

    async def scenario(client):
        reader, writer = await client.connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\nx")
        writer.close()
        await until(lambda: active(registry) == 0, "it has ended")

    serving(app(registry, [("/", Complete)]), scenario)
    assert counts(registry) == {("GET", "/", "200"): 1}


def test_a_handler_that_is_cancelled(registry):
    """A cancelled handler is a 500; before Tornado 6.6, which sends nothing then, it is a 499."""
    cancelled = []

    class Cancelled(web.RequestHandler):
        async def get(self):
            cancelled.append(asyncio.current_task())
            cancelled[0].cancel()
            await asyncio.Event().wait()

    async def scenario(client):
        _, writer = await client.connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: cancelled and cancelled[0].done(), "it is cancelled")
        writer.close()
        await until(lambda: active(registry) == 0, "it has ended")

    serving(app(registry, [("/", Cancelled)]), scenario)
    assert counts(registry) == {("GET", "/", "500" if tornado.version_info >= (6, 6) else "499"): 1}


@web.stream_request_body
class Upload(web.RequestHandler):
    def data_received(self, chunk):
        pass

    def post(self):
        self.write("done")


@pytest.mark.parametrize("handler", [Hello, Upload])
def test_a_client_that_goes_away_while_it_sends(registry, handler):
    """A client that goes away before its whole body has arrived is a 499, for streamed bodies too."""

    async def scenario(client):
        _, writer = await client.connect(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf")
        await until(lambda: active(registry) == 1, "the headers have arrived")
        writer.close()
        await until(lambda: active(registry) == 0, "it has ended")

    gc.disable()  # it would end the request too, but at any time
    try:
        serving(app(registry, [("/", handler)]), scenario)
    finally:
        gc.enable()
    assert counts(registry) == {("POST", "/", "499"): 1}


@pytest.mark.parametrize("handler", [Hello, Upload])
def test_a_body_that_is_too_long_is_a_400(registry, handler):
    """A body that is longer than the server allows is a 400, which the connection sends itself."""

    async def scenario(client):
        request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
        assert b" 400 " in await client.raw(request)

    serving(app(registry, [("/", handler)]), scenario, max_body_size=1000)
    assert counts(registry) == {("POST", "/", "400"): 1}
    assert active(registry) == 0


def test_a_server_that_closes_its_connections(registry):
    """Requests under way at the end of a server are 499, and so is one whose handler closes it."""
    waiting = []

    class Waiting(web.RequestHandler):
        async def get(self):
            release = asyncio.Event()
            waiting.append(release)
            if self.get_argument("abort", None):
                self.request.connection.close()
            await release.wait()

    application = app(registry, [("/", Waiting)])

    async def main():
        sock, port = bind_unused_port()
        server = HTTPServer(application)
        server.add_sockets([sock])
        client = Client(port)
        assert await client.raw(b"GET /?abort=1 HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        assert counts(registry) == {("GET", "/", "499"): 1}
        _, writer = await client.connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: len(waiting) == 2, "it waits")
        assert active(registry) == 1
        server.stop()
        await server.close_all_connections()
        await until(lambda: active(registry) == 0, "it has ended")
        for release in waiting:
            release.set()
        writer.close()
        await asyncio.sleep(0)  # for the handlers to return

    asyncio.run(main())
    assert counts(registry) == {("GET", "/", "499"): 2}
    assert active(registry) == 0


def test_a_detached_connection_is_no_request_any_more(registry):
    """A detached connection, as of a tunnel, is a 101, and neither active nor slow from then on."""
    streams = []

    class Tunnel(web.RequestHandler):
        SUPPORTED_METHODS = ("CONNECT",)

        async def connect(self):
            streams.append(self.detach())
            await streams[0].write(b"HTTP/1.1 200 Connected\r\n\r\n")

    async def scenario(client):
        reader, writer = await client.connect(b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        assert active(registry) == 0
        writer.close()
        streams[0].close()

    serving(app(registry, [("/", Tunnel)]), scenario)
    assert counts(registry) == {("CONNECT", "/", "101"): 1}


class Connection(HTTPConnection):
    """A connection that isn't Tornado's own."""

    def set_close_callback(self, callback):
        pass


def test_a_request_that_is_dropped_ends(registry):
    """A request that is dropped without an answer is a 499, and no longer active."""
    application = app(registry)
    request = HTTPServerRequest(
        connection=Connection(),
        start_line=RequestStartLine("GET", "/users/1", "HTTP/1.1"),
        headers=HTTPHeaders({"Host": "a"}),
    )
    delegate = application.find_handler(request)
    assert active(registry) == 1
    del request, delegate
    gc.collect()
    assert counts(registry) == {("GET", r"/users/(\d+)", "499"): 1}
    assert active(registry) == 0


def test_a_connection_that_is_none_is_not_measured(registry, caplog):
    """A request on a mock of a connection is answered and not measured, and that is logged."""
    connection = object()
    request = HTTPServerRequest(
        connection=connection,
        start_line=RequestStartLine("GET", "/", "HTTP/1.1"),
        headers=HTTPHeaders({"Host": "a"}),
    )
    assert app(registry).find_handler(request).handler_class is Hello
    assert active(registry) == 0
    assert "can't measure" in caplog.text
