"""instrument(), MetricsHandler and MeteredHandler: what they record, and that nobody notices them."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import sys
import time
import weakref

import pytest
import tornado
from tornado import gen, routing, web, websocket, wsgi
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPServerConnectionDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.testing import bind_unused_port

import tapes
from tapes.contrib.tornado import UNMATCHED, MeteredHandler, MetricsHandler, instrument
from tapes.errors import InvalidArgument
from tests.contrib.recorded import ACTIVE, DURATION, active, counts
from tests.processes import run_python


async def until(condition, what):
    """Let the loop go on until a condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.002)


class Client:
    """What a test does to a server."""

    def __init__(self, port):
        self.port = port
        self._client = AsyncHTTPClient(force_instance=True)

    async def fetch(self, path, method="GET", **options):
        return await self._client.fetch(
            f"http://127.0.0.1:{self.port}{path}", method=method, raise_error=False,
            allow_nonstandard_methods=True, follow_redirects=False, **options,
        )  # fmt: skip

    async def connect(self, request):
        """Send bytes on a connection of their own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        await writer.drain()
        return reader, writer

    async def raw(self, request):
        """Send bytes and return all that the server answers until it closes."""
        reader, writer = await self.connect(request)
        answer = await reader.read()
        writer.close()
        return answer


def serving(application, scenario, **options):
    """Run a scenario against a real server."""

    async def main():
        sock, port = bind_unused_port()
        server = HTTPServer(application, **options)
        server.add_sockets([sock])
        client = Client(port)
        try:
            await asyncio.wait_for(scenario(client), 20)
        finally:
            client._client.close()
            server.stop()
            await server.close_all_connections()

    asyncio.run(main())


def fetching(application, *requests, **options):
    """Send requests, one after the other; return the answers."""
    answers = []

    async def scenario(client):
        for method, path in requests:
            answers.append(await client.fetch(path, method))

    serving(application, scenario, **options)
    return answers


class Hello(web.RequestHandler):
    def get(self, *args, **kwargs):
        self.write("hello")

    post = get


class Other(Hello):
    pass


class Later(web.RequestHandler):
    async def get(self):
        await asyncio.sleep(0)
        self.write("later")


class Decorated(web.RequestHandler):
    @gen.coroutine
    def get(self):
        yield gen.moment
        self.write("decorated")


class Broken(web.RequestHandler):
    def get(self):
        raise RuntimeError("broken")


class Refusing(web.RequestHandler):
    def get(self):
        raise web.HTTPError(409)


class Finishing(web.RequestHandler):
    def get(self):
        self.set_status(410)
        raise web.Finish


class Chunks(web.RequestHandler):
    async def get(self):
        for number in range(3):
            self.write(str(number))
            await self.flush()


class FinishingLater(web.RequestHandler):
    async def get(self):
        self.write("some")
        await self.flush()
        raise web.Finish


class Gone(web.RequestHandler):
    def get(self):
        self.request.connection.stream.close()
        self.write("to nobody")


class BrokenLater(web.RequestHandler):
    async def get(self):
        self.write("some")
        await self.flush()
        raise RuntimeError("in the middle")


class Overriding(web.RequestHandler):
    """Calls no super()."""

    def initialize(self):
        pass

    def prepare(self):
        pass

    def on_finish(self):
        pass

    def _log(self):
        pass

    def get(self):
        self.write("own")


class Unmade(web.RequestHandler):
    def initialize(self):
        raise RuntimeError("can't be made")


class BadHeader(web.RequestHandler):
    def get(self):
        self._reason = "a\r\nb"
        self.write("body")


class Echo(websocket.WebSocketHandler):
    def on_message(self, message):
        self.write_message(message)


RULES = [
    (r"/", Hello),
    (r"/users/(\d+)", Hello),
    (r"^/anchored/(?P<name>\w+)$", Other),
    (r"/later", Later),
    (r"/decorated", Decorated),
    (r"/broken", Broken),
    (r"/refusing", Refusing),
    (r"/finishing", Finishing),
    (r"/chunks", Chunks),
    (r"/broken-later", BrokenLater),
    (r"/finishing-later", FinishingLater),
    (r"/gone", Gone),
    (r"/price\$", Hello),
    (r"/overriding", Overriding),
    (r"/moved", web.RedirectHandler, {"url": "/"}),
    (r"/unmade", Unmade),
    (r"/bad-header", BadHeader),
    (r"/socket", Echo),
]


def app(registry, rules=RULES, settings=None, **options):
    application = web.Application(rules, **(settings or {}))
    assert instrument(application, registry, **options) is application
    return application


def test_requests_are_counted_by_pattern(registry):
    """Never by raw path; what matches nothing shares one series, invented methods another."""
    requests = [("GET", f"/{kind}/{number}") for number in range(5) for kind in ("users", "nothing")]
    requests += [
        (f"BREW{number}", f"/{kind}/{number}") for number in range(3) for kind in ("users", "nothing")
    ]
    requests += [("POST", "/users/1"), ("PUT", "/users/1"), ("HEAD", "/users/1"), ("GET", "/anchored/x?y=1")]
    fetching(app(registry), *requests)
    assert counts(registry) == {
        ("GET", r"/users/(\d+)", "200"): 5,
        ("GET", UNMATCHED, "404"): 5,
        ("_OTHER", r"/users/(\d+)", "405"): 3,
        ("_OTHER", UNMATCHED, "405"): 3,
        ("POST", r"/users/(\d+)", "200"): 1,
        ("PUT", r"/users/(\d+)", "405"): 1,
        ("HEAD", r"/users/(\d+)", "405"): 1,
        ("GET", r"/anchored/(?P<name>\w+)", "200"): 1,
    }
    assert active(registry) == 0


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/later", 200), ("/decorated", 200), ("/broken", 500), ("/refusing", 409), ("/finishing", 410),
        ("/chunks", 200), ("/broken-later", 500), ("/finishing-later", 200),
        (r"/price$", 200), ("/overriding", 200), ("/moved", 301),
    ],
)  # fmt: skip
def test_every_kind_of_handler_is_counted_once(registry, path, status):
    """Coroutines of both kinds, exceptions at any time, Finish, streams, methods without super()."""
    fetching(app(registry), ("GET", path), ("GET", path))
    assert counts(registry) == {("GET", path.replace("$", r"\$"), str(status)): 2}
    assert active(registry) == 0


@pytest.mark.parametrize(("path", "status"), [("/unmade", "500"), ("/bad-header", "500"), ("/gone", "499")])
def test_what_can_not_be_answered(registry, path, status):
    """A handler that can't be made, headers that can't be written, a client that has gone."""

    async def scenario(client):
        assert await client.raw(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()) == b""

    serving(app(registry), scenario)
    assert counts(registry) == {("GET", path, status): 1}
    assert active(registry) == 0


class Hosts(routing.Matcher):
    def match(self, request):
        return {} if "X-Special" in request.headers else None


def test_host_rules_are_told_apart(registry):
    """One class under many rules: the one that matched is named, also if it was added later."""
    application = app(registry, [(r"/a/(.*)", Hello), (r"/(.*)", Hello)])

    async def scenario(client):
        await client.fetch("/a/1")
        await client.fetch("/b/1")
        await client.fetch("/a/1", headers={"Host": "else.where"})
        application.add_handlers(r"else\.where", [(r"/(a|b)/\d", Hello), (r"/only", Other)])
        for path in ("/a/1", "/only", "/c"):
            await client.fetch(path, headers={"Host": "else.where"})
        await client.fetch("/a/1")

    serving(application, scenario)
    assert counts(registry) == {
        ("GET", "/a/(.*)", "200"): 3,
        ("GET", "/(.*)", "200"): 2,
        ("GET", r"/(a|b)/\d", "200"): 1,
        ("GET", "/only", "200"): 1,
    }


class Delegate(HTTPServerConnectionDelegate):
    def start_request(self, server_conn, request_conn):
        return Message(request_conn)


class Message(routing._DefaultMessageDelegate):
    """Answers 404 by itself."""


class Choosing(routing.Router):
    """A router of the user's, who knows its handlers."""

    def __init__(self, application):
        self.application = application

    def find_handler(self, request, **kwargs):
        if request.path.endswith("/none"):
            return None
        return self.application.get_handler_delegate(request, Later)


def answer_204(request):
    request.connection.write_headers(ResponseStartLine("", 204, "No Content"), HTTPHeaders())
    request.connection.finish()


def wsgi_app(environ, start_response):
    start_response("202 Accepted", [])
    return [environ["PATH_INFO"].encode()]


def test_all_that_a_rule_can_lead_to(registry):
    """Nested rules, routers, applications, callables, delegates, WSGI; the deepest pattern names it."""
    inner = web.Application([(r"/inner/(\d+)", Hello)])
    application = app(registry, [])
    application.wildcard_router.add_rules([
        (routing.HostMatches(r"127\.0\.0\.1"), [(r"/nested/(\w+)", Hello)]),
        (r"/inner.*", inner),
        (r"/router.*", routing.RuleRouter([(r"/router/app/.*", answer_204)])),
        (r"/own.*", Choosing(application)),
        (r"/call/.*", answer_204),
        (r"/delegate", Delegate()),
        (r"/wsgi/.*", wsgi.WSGIContainer(wsgi_app)),
        (r"/fallback/.*", web.FallbackHandler, {"fallback": wsgi.WSGIContainer(wsgi_app)}),
        (Hosts(), Other),
        (r"/gone", web.ErrorHandler, {"status_code": 410}),
        (r"/any/.*", [(routing.AnyMatches(), Other)]),
    ])  # fmt: skip

    async def scenario(client):
        for path in ("/nested/a", "/inner/1", "/inner/x", "/router/app/1", "/router/x", "/own/1", "/own/none",
                     "/call/1", "/delegate", "/wsgi/1", "/fallback/1", "/gone", "/any/1"):  # fmt: skip
            await client.fetch(path)
        await client.fetch("/special", headers={"X-Special": "1"})

    serving(application, scenario)
    assert counts(registry) == {
        ("GET", r"/nested/(\w+)", "200"): 1,
        ("GET", r"/inner/(\d+)", "200"): 1,
        ("GET", "/router/app/.*", "204"): 1,
        ("GET", "/own.*", "200"): 1,
        ("GET", "/call/.*", "204"): 1,
        ("GET", "/delegate", "404"): 1,
        ("GET", "/wsgi/.*", "202"): 1,
        ("GET", "/fallback/.*", "202"): 1,
        ("GET", "Other", "200"): 1,
        ("GET", "/gone", "410"): 1,
        ("GET", "/any/.*", "200"): 1,
        ("GET", UNMATCHED, "404"): 3,
    }
    assert active(registry) == 0


def test_a_default_handler_is_no_route(registry):
    """It answers what matches nothing."""
    settings = {"default_handler_class": Other}
    fetching(app(registry, [(r"/a", Hello)], settings), ("GET", "/a"), ("GET", "/b"))
    assert counts(registry) == {("GET", "/a", "200"): 1, ("GET", UNMATCHED, "200"): 1}


def test_instrumenting_twice_measures_once(registry):
    """The same application again, one within another, and one as the fallback of another."""
    inner = app(registry, [(r"/inner/(\d+)", Hello)])
    back = app(registry, [(r"/back/(\d+)", Hello)])
    rules = [(r"/inner.*", inner), (r"/", Hello), (r".*", web.FallbackHandler, {"fallback": back})]
    application = app(registry, rules)
    for again in (registry, tapes.Registry()):
        assert instrument(application, again) is application
    fetching(application, ("GET", "/"), ("GET", "/inner/1"), ("GET", "/back/1"))
    assert list(again.snapshot()) == []
    assert counts(registry) == {
        ("GET", "/", "200"): 1,
        ("GET", r"/inner/(\d+)", "200"): 1,
        ("GET", r"/back/(\d+)", "200"): 1,
    }
    assert active(registry) == 0


def test_two_registries_both_measure(registry):
    """An application within another one, each with its own."""
    outer = tapes.Registry()
    inner = app(registry, [(r"/inner/(\d+)", Hello)])
    fetching(app(outer, [(r"/inner.*", inner)]), ("GET", "/inner/1"))
    assert counts(registry) == counts(outer) == {("GET", r"/inner/(\d+)", "200"): 1}
    assert active(registry) == active(outer) == 0


def test_a_hundred_requests_on_one_connection(registry):
    """Keep-alive and pipelining: each is counted."""

    async def scenario(client):
        one = b"GET /users/7 HTTP/1.1\r\nHost: a\r\n\r\n"
        last = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        assert (await client.raw(one * 99 + last)).count(b"HTTP/1.1 200 OK") == 100

    serving(app(registry), scenario)
    assert counts(registry) == {("GET", r"/users/(\d+)", "200"): 100}
    assert active(registry) == 0


PATHS = ["/", "/later", "/broken", "/refusing", "/finishing", "/chunks", "/broken-later", "/moved", "/none",
         "/cancelled", "/unmade", "/bad-header", "/users/1"]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "BREW"])
@pytest.mark.parametrize("path", PATHS)
def test_the_application_sees_what_it_would_see_without(registry, caplog, method, path):
    """The same bytes and the same logs."""
    caplog.set_level(logging.INFO)
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
    )
    seen = []
    for application in (web.Application(RULES), app(registry)):
        caplog.clear()
        answers = []

        async def scenario(client, answers=answers):
            answers.append(await client.raw(request))

        serving(application, scenario)
        logs = [
            (record.name, re.sub(r"[\d.]+ms|0x\w+|\d+\)", "", record.message)) for record in caplog.records
        ]
        seen.append((re.sub(rb"Date: [^\r]*", b"", answers[0]), [log for log in logs if log[0] != "asyncio"]))
    assert seen[0] == seen[1]
    assert active(registry) == 0


def test_a_stream_is_timed_to_its_last_byte(clock, registry):
    """And the connection's body before the handler ran is part of it."""

    class Slow(web.RequestHandler):
        async def get(self):
            for _ in range(4):
                clock.advance(0.25)
                self.write("x")
                await self.flush()

    fetching(app(registry, [("/", Slow)]), ("GET", "/"))
    (series,) = registry.snapshot().series(DURATION)
    assert (series.count, series.sum) == (1, 1.0)


def test_a_client_that_goes_away_is_a_499(registry):
    """In the middle of a stream: counted once, at once, and the handler is told as always."""
    told = []

    class Endless(web.RequestHandler):
        async def get(self):
            self.gone = asyncio.Event()
            self.write("x")
            await self.flush()
            await self.gone.wait()
            told.append((active(registry), counts(registry)))

        def on_connection_close(self):
            told.append("closed")
            asyncio.get_running_loop().call_soon(self.gone.set)

    async def scenario(client):
        reader, writer = await client.connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"x")
        assert active(registry) == 1
        writer.close()
        await until(lambda: len(told) == 2, "the handler has seen it")

    serving(app(registry, [("/", Endless)]), scenario)
    expected = {("GET", "/", "499"): 1}
    assert told == ["closed", (0, expected)]
    assert counts(registry) == expected  # and not once more when the handler finished


def test_a_client_that_has_got_all_may_go(registry):
    """Its answer was complete, though the handler goes on."""

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
    """Tornado answers 500; where it is too old for that, the request lasts until the client goes."""
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
    """Nobody is there to be answered, whether the body is streamed or not."""

    async def scenario(client):
        _, writer = await client.connect(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf")
        await until(lambda: active(registry) == 1, "the headers have arrived")
        writer.close()
        await until(lambda: active(registry) == 0, "it has ended")

    gc.disable()  # which would end it, too, but at any time
    try:
        serving(app(registry, [("/", handler)]), scenario)
    finally:
        gc.enable()
    assert counts(registry) == {("POST", "/", "499"): 1}


@pytest.mark.parametrize("handler", [Hello, Upload])
def test_a_body_that_is_too_long_is_a_400(registry, handler):
    """Which the connection answers itself."""

    async def scenario(client):
        request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
        assert b" 400 " in await client.raw(request)

    serving(app(registry, [("/", handler)]), scenario, max_body_size=1000)
    assert counts(registry) == {("POST", "/", "400"): 1}
    assert active(registry) == 0


def test_a_server_that_closes_its_connections(registry):
    """Requests that are under way end as 499, and so does one whose handler aborts it."""
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


def test_websockets_are_counted_by_their_handshake(clock, registry):
    """One 101; an open one is neither active nor slow; a refused one has its status."""

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


def test_a_detached_connection_is_no_request_any_more(registry):
    """As for a tunnel."""
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


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="nothing is freed at once")
@pytest.mark.parametrize("body_sizes", [False, True])
@pytest.mark.parametrize("path", ["/", "/later", "/chunks", "/none", "/metered"])
def test_no_cycle_is_left(registry, path, body_sizes):
    """A request is freed without the collector, as it is without us."""
    requests = []

    class Noting(web.Application):
        def find_handler(self, request, **kwargs):
            requests.append(weakref.ref(request))
            return super().find_handler(request, **kwargs)

    class CyclesEndpoint(MeteredHandler):
        async def get(self):
            self.write("metered")

    application = Noting([*RULES, ("/metered", CyclesEndpoint)])
    instrument(application, registry, body_sizes=body_sizes)

    async def scenario(client):
        _, writer = await client.connect(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() * 3)
        await until(lambda: sum(counts(registry).values()) == 3, "all are answered")
        writer.close()
        await until(lambda: not any(request() for request in requests), "all are freed")

    gc.collect()
    gc.disable()
    try:
        serving(application, scenario)
    finally:
        gc.enable()
    assert len(requests) == 3


class Connection(HTTPConnection):
    """One that isn't Tornado's own."""

    def set_close_callback(self, callback):
        pass


def test_a_request_that_is_dropped_ends(registry):
    """Whoever asks the application by himself and forgets it: nothing stays active."""
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
    """A mock of a test: its request is answered all the same."""
    connection = object()
    request = HTTPServerRequest(
        connection=connection,
        start_line=RequestStartLine("GET", "/", "HTTP/1.1"),
        headers=HTTPHeaders({"Host": "a"}),
    )
    assert app(registry).find_handler(request).handler_class is Hello
    assert active(registry) == 0
    assert "can't measure" in caplog.text


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_metrics_are_mounted_with_and_without_a_slash(registry, path):
    """JSON by default, not cached, not measured, never a 304; other methods may not."""
    application = app(registry, settings={"xsrf_cookies": True})
    answers = fetching(application, ("GET", "/later"), ("GET", path), ("HEAD", path), ("POST", path),
                       ("BREW", path))  # fmt: skip
    _, got, head, post, brew = answers
    assert (got.code, head.code, post.code, brew.code) == (200, 200, 405, 405)
    assert got.headers["Content-Type"] == "application/json"
    assert got.headers["Vary"] == "Accept"
    assert got.headers["Cache-Control"] == "no-store"
    assert set(got.headers) - {"Connection"} == {
        "Server",
        "Date",
        "Content-Type",
        "Vary",
        "Cache-Control",
        "Content-Length",
    }
    selector = '{method="GET",route="/later",status="200"}'
    assert json.loads(got.body)["http"]["server"]["request"]["duration"][selector]["count"] == 1
    assert head.body == b""
    assert int(head.headers["Content-Length"]) > 100
    assert post.headers["Allow"] == brew.headers["Allow"] == "GET, HEAD"
    assert post.body == b"The metrics can only be read.\n"
    assert set(counts(registry)) == {("GET", "/later", "200")}


def test_metrics_are_negotiated(registry):
    """By Accept, or by ?format=."""

    async def scenario(client):
        text = await client.fetch("/metrics", headers={"Accept": "text/plain", "If-None-Match": "*"})
        assert (text.code, text.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert (await client.fetch("/metrics?format=openmetrics")).body.endswith(b"# EOF\n")
        assert (await client.fetch("/metrics?format=yaml")).code == 400

    serving(app(registry), scenario)


def test_options(registry):
    """Path, exclusion, labels, guard, prefix, sizes."""

    async def guard(request):
        await asyncio.sleep(0)
        return request.headers.get("X-Token") == "secret"

    application = app(
        registry,
        metrics_path="/internal/metrics",
        exclude=["/later", "/chu*", "/anchored/*"],
        labels=lambda request: {"tenant": request.host_name},
        guard=guard,
        prefix="shop",
        body_sizes=True,
    )

    async def scenario(client):
        for path in ("/later", "/anchored/x", "/metrics"):
            await client.fetch(path)
        await client.fetch("/users/1", "POST", body="12345")
        await client.fetch("/chunks")
        assert (await client.fetch("/internal/metrics")).code == 403
        assert (await client.fetch("/internal/metrics", headers={"X-Token": "secret"})).code == 200

    serving(application, scenario)
    snapshot = registry.snapshot()
    labels = {"method": "POST", "route": r"/users/(\d+)"}
    assert snapshot.get("shop." + DURATION, **labels, status="200", tenant="127.0.0.1").count == 1
    assert snapshot.get("shop.http.server.request.body.size", **labels).sum == 5
    assert snapshot.get("shop.http.server.response.body.size", **labels).sum == len("hello")
    assert snapshot.get("shop.http.server.response.body.size", method="GET", route="/chunks").sum == 3
    assert {dict(series.labels)["route"] for series in snapshot.series("shop." + DURATION)} == {
        r"/users/(\d+)", "/chunks", UNMATCHED,
    }  # fmt: skip


def test_options_that_can_not_be_used(registry):
    """Are refused when they are given."""
    for options in ({"metrics_path": "metrics"}, {"guard": 1}, {"route": "x"}, {"exclude": ["x"]}):
        application = web.Application([])
        with pytest.raises(InvalidArgument):
            instrument(application, registry, **options)
        assert "find_handler" not in vars(application)


def test_the_callables_of_the_user(registry, caplog):
    """route= is asked before the pattern is taken; what fails is logged and changes no answer."""

    def route(request):
        return {"/": "index", "/later": None}[request.path]

    fetching(app(registry, route=route), ("GET", "/"), ("GET", "/later"), ("GET", "/chunks"))
    assert counts(registry) == {
        ("GET", "index", "200"): 1, ("GET", "/later", "200"): 1, ("GET", "/chunks", "200"): 1
    }  # fmt: skip
    assert "the callable for routes failed" in caplog.text
    failing = app(tapes.Registry(), labels=lambda request: 1 / 0, guard=lambda request: 1 / 0)
    assert [answer.code for answer in fetching(failing, ("GET", "/"), ("GET", "/metrics"))] == [200, 403]
    assert "the guard of the metrics failed" in caplog.text


def test_metrics_can_be_off_or_alone(registry, monkeypatch):
    """metrics_path=None leaves the path to the application, for example to a MetricsHandler."""
    rules = [
        ("/metrics", MetricsHandler, {"registry": registry}),
        (
            "/guarded",
            MetricsHandler,
            {"registry": registry, "guard": lambda request: "X-Me" in request.headers},
        ),
        ("/default", MetricsHandler),
    ]

    async def scenario(client):
        registry.counter("jobs").increment()
        assert json.loads((await client.fetch("/metrics")).body)["jobs"]["value"] == 1
        assert (await client.fetch("/metrics", "HEAD")).code == 200
        assert (await client.fetch("/metrics", "DELETE")).code == 405
        assert (await client.fetch("/guarded")).code == 403
        assert (await client.fetch("/guarded", headers={"X-Me": "1"})).code == 200
        assert (await client.fetch("/default")).code == 200
        monkeypatch.setenv("TAPES_METRICS_TOKEN", "secret")
        refused = await client.fetch("/metrics")
        assert (refused.code, refused.headers["WWW-Authenticate"]) == (401, 'Bearer realm="metrics"')
        assert (await client.fetch("/metrics", headers={"Authorization": "Bearer secret"})).code == 200
        assert (await client.fetch("/guarded", headers={"X-Me": "1"})).code == 200

    serving(web.Application(rules), scenario)
    assert ACTIVE not in {family.name for family in registry.snapshot()}
    (answer,) = fetching(app(tapes.Registry(), metrics_path=None), ("GET", "/metrics"))
    assert answer.code == 404


def test_one_of_several_processes_never_answers_for_all(registry, monkeypatch):
    """It may not join: 503 and what to do, not its own share; its requests are answered."""
    monkeypatch.setenv("TAPES_AUTOSTART", "0")
    monkeypatch.setattr("tornado.process._task_id", 0)
    hello, metrics = fetching(app(registry), ("GET", "/"), ("GET", "/metrics"))
    assert (hello.code, metrics.code) == (200, 503)
    assert b"TAPES_ADDR" in metrics.body


def test_turned_off(registry, monkeypatch):
    """TAPES_DISABLED=1: nothing is measured, and the metrics say so."""
    monkeypatch.setenv("TAPES_DISABLED", "1")
    hello, metrics = fetching(app(registry), ("GET", "/"), ("GET", "/metrics"))
    assert (hello.code, metrics.code) == (200, 503)
    assert b"TAPES_DISABLED" in metrics.body
    assert counts(registry) == {}


def test_without_tornado_it_says_what_to_install(tmp_path):
    """And nothing else of tapes needs it."""
    done = run_python(
        """
import sys
sys.modules["tornado"] = None
import tapes
try:
    import tapes.contrib.tornado
except tapes.errors.MissingExtra as error:
    print(error)
""",
        cwd=tmp_path,
    )
    assert "pip install 'tapes[tornado]'" in done.stdout, done.stderr


def endpoint(name):
    """Count of latencies, their sum, and errors of a handler's class."""
    snapshot = tapes.default_registry.snapshot()
    latency = snapshot.get(f"http.endpoints.{name}.latency")
    return latency.count, snapshot.get(f"http.endpoints.{name}.error_rate").count


@pytest.mark.parametrize("is_instrumented", [False, True])
def test_every_metered_class_has_metrics_of_its_own(registry, is_instrumented):
    """Native and decorated coroutines, streams, exceptions, methods without super(); subclasses too."""
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
    """It only is there to be derived from."""
    names = {family.name for family in tapes.default_registry.snapshot()}
    assert not any(name.startswith("http.endpoints.MeteredHandler.") for name in names)


def test_metered_requests_end_with_the_last_byte_or_the_client(monkeypatch):
    """A stream is timed to its end, a websocket to its handshake; who goes away while it sends is counted."""
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
        await until(lambda: UploadEndpoint.closed, "the handler is told")
        assert endpoint("UploadEndpoint") == (1, 0)

    serving(
        web.Application([("/", TimedEndpoint), ("/socket", SocketEndpoint), ("/up", UploadEndpoint)]),
        scenario,
    )
    timed = tapes.default_registry.snapshot().get("http.endpoints.TimedEndpoint.latency")
    assert (timed.count, timed.sum) == (1, 11.0)
    assert endpoint("SocketEndpoint") == (1, 0)
