"""One application in four frameworks, behind the adapter of each, and how a test sends requests to it.

The application answers:

    /users/<n>     GET, HEAD and POST: reads the body, calls `Harness.during`, answers "hello"
    /gone          410
    /broken        raises `Broken` before it answers
    /cut           raises `Broken` after the first piece of its body
    /stream        four pieces of one byte; 0.25 s pass before each
    /endless       one piece, and then no end
    /health, /healthy, /static/<path>     200
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import Callable

import anyio
import flask
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from tornado import web

from tapes.contrib import asgi, tornado, wsgi
from tapes.contrib.flask import Tapes
from tests.contrib.asgi import server as asgi_server
from tests.contrib.recorded import active
from tests.contrib.tornado import server as tornado_server
from tests.contrib.wsgi import server as wsgi_server


class Broken(Exception):
    """What the application raises."""


@dataclasses.dataclass
class Reply:
    """What a client or a server got. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Harness:
    """An application, its adapter, and a server.

    Attributes:
        adapter: The class or function that takes the application, a registry and options.
        user: The template of ``/users/<n>``.
        static: The template of ``/static/<path>``.
        unknown_method: The route of ``/users/<n>`` with a method that it does not have.
        raises: Whether the application's exceptions reach the server.
        can_await: Whether guards may be asynchronous.
        many: Number of requests that a test sends where "any number" is meant.
        during: Called while a request for ``/users/<n>`` is answered.
        error: The exception that the application raises.
    """

    adapter: Callable
    user = "/users/{n}"
    static = "/static/{path:path}"
    unknown_method = user
    raises = True
    can_await = True
    many = 10_000

    def __init__(self, clock):
        self.clock = clock
        self.during = lambda: None
        self.error = Broken()

    def app(self, registry=None, **options):
        """Return the application behind its adapter."""
        raise NotImplementedError

    def ask_all(self, app, requests):
        """Send (path, method) pairs one after the other."""
        for path, method in requests:
            self.ask(app, path, method)

    def ask(self, app, path, method="GET", body=b"", **headers) -> Reply:
        """Send a request and read its answer. In names of headers, underscores become hyphens."""
        raise NotImplementedError

    def leave(self, app, registry):
        """Send a request for ``/endless``; read one piece of the answer, and go away."""
        raise NotImplementedError

    @staticmethod
    def path_of(source):
        """Return the path of what the user's callables get."""
        raise NotImplementedError

    @staticmethod
    def header_of(source, name):
        """Return a header of what the user's callables get, or ``None``."""
        raise NotImplementedError

    def pieces(self):
        for _ in range(4):
            self.clock.advance(0.25)
            yield b"x"

    def cut(self):
        yield b"x"
        raise self.error

    def endless(self):
        while True:
            yield b"x"


class WSGI(Harness):
    """A bare application, which leaves its routes in the environ."""

    adapter = wsgi.TapesMiddleware
    can_await = False
    templates = {r"/users/\d+": Harness.user, r"/static/.+": Harness.static}

    def app(self, registry=None, **options):
        return wsgi.TapesMiddleware(self.application, registry, **options)

    def application(self, environ, start_response):
        path = environ["PATH_INFO"]
        known = ("/gone", "/broken", "/cut", "/stream", "/endless", "/health", "/healthy")
        found = [template for pattern, template in self.templates.items() if re.fullmatch(pattern, path)]
        route = found[0] if found else path if path in known else None
        if route is not None:
            environ[wsgi.ROUTE] = route
        if path == "/broken":
            raise self.error
        status = "410 Gone" if path == "/gone" else "200 OK" if route else "404 Not Found"
        if route and environ["REQUEST_METHOD"] not in ("GET", "HEAD", "POST"):
            status = "405 Method Not Allowed"
        if route == self.user:
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            self.during()
        start_response(status, [("Content-Type", "text/plain")])
        if environ["REQUEST_METHOD"] == "HEAD":
            return []
        streams = {"/stream": self.pieces, "/cut": self.cut, "/endless": self.endless}
        return streams[path]() if path in streams else [b"hello"]

    def ask(self, app, path, method="GET", body=b"", **headers):
        status, fields, text = wsgi_server.ask(app, path, method, body, headers)
        return Reply(status, {name.lower(): value for name, value in fields}, text)

    def leave(self, app, registry):
        body = app(wsgi_server.environ_of("/endless"), lambda *_: None)
        assert next(iter(body)) == b"x"
        body.close()

    @staticmethod
    def path_of(source):
        return source["PATH_INFO"]

    @staticmethod
    def header_of(source, name):
        return source.get("HTTP_" + name.upper().replace("-", "_"))


class Flask(WSGI):
    """An application of Flask with the extension; exceptions leave it, as in tests and in debug mode."""

    adapter = Tapes
    many = 2_000
    user = "/users/<int:n>"
    static = "/static/<path:path>"
    unknown_method = "<unmatched>"

    def app(self, registry=None, **options):
        app = flask.Flask("contract", static_folder=None)
        app.testing = True
        rules = {
            self.user: self.user_view,
            self.static: lambda path: "hello",
            "/gone": lambda: ("gone", 410),
            "/broken": self.broken,
            "/cut": lambda: flask.Response(self.cut()),
            "/stream": lambda: flask.Response(self.pieces()),
            "/endless": lambda: flask.Response(self.endless()),
            "/health": lambda: "hello",
            "/healthy": lambda: "hello",
        }
        for rule, view in rules.items():
            app.add_url_rule(rule, rule.replace(".", ""), view, methods=["GET", "POST"])
        Tapes(app, registry, **options)
        return app

    def user_view(self, n):
        flask.request.get_data()
        self.during()
        return "hello"

    def broken(self):
        raise self.error


class ASGI(Harness):
    """An application of Starlette."""

    adapter = asgi.TapesMiddleware
    backend = "asyncio"

    def app(self, registry=None, **options):
        both = ["GET", "HEAD", "POST"]
        routes = [
            Route(self.user, self.user_endpoint, methods=both),
            Route(self.static, self.plain),
            Route("/gone", lambda request: PlainTextResponse("gone", 410)),
            Route("/broken", self.broken),
            Route("/cut", lambda request: StreamingResponse(later(self.cut()))),
            Route("/stream", lambda request: StreamingResponse(later(self.pieces()))),
            Route("/endless", lambda request: StreamingResponse(later(self.endless()))),
            Route("/health", self.plain),
            Route("/healthy", self.plain),
        ]
        return asgi.TapesMiddleware(Starlette(routes=routes), registry, **options)

    async def plain(self, request):
        return PlainTextResponse("hello")

    async def user_endpoint(self, request):
        await request.body()
        self.during()
        return PlainTextResponse("" if request.method == "HEAD" else "hello")

    async def broken(self, request):
        raise self.error

    def ask(self, app, path, method="GET", body=b"", **headers):
        lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        got = asgi_server.ask(app, path, method, body, backend=self.backend, headers=lines)
        return Reply(got.status, {k.decode(): v.decode() for k, v in got.headers.items()}, got.body)

    def ask_all(self, app, requests):
        async def main():
            for path, method in requests:
                receive = asgi_server.receiving({"type": "http.request"})
                await app(asgi_server.scope_of(path, method), receive, asgi_server.Answer().send)

        anyio.run(main, backend=self.backend)

    def leave(self, app, registry):
        sent = []

        async def send(message):
            if len(sent) == 2:
                raise BrokenPipeError
            sent.append(message)

        with contextlib.suppress(Exception):  # Starlette raises an error of its own
            receive = asgi_server.receiving({"type": "http.request"})
            anyio.run(app, asgi_server.scope_of("/endless"), receive, send, backend=self.backend)
        assert sent[1]["body"] == b"x"

    @staticmethod
    def path_of(source):
        return source["path"]

    @staticmethod
    def header_of(source, name):
        return {key.decode(): value.decode() for key, value in source["headers"]}.get(name)


class Trio(ASGI):
    """The same on trio."""

    backend = "trio"


async def later(pieces):
    """Yield ``pieces``, as an asynchronous generator."""
    for piece in pieces:
        await anyio.sleep(0)
        yield piece


class Tornado(Harness):
    """An application of Tornado, on a real server. Tornado answers exceptions itself."""

    adapter = staticmethod(tornado.instrument)
    user = r"/users/(\d+)"
    static = "/static/(.*)"
    unknown_method = user
    raises = False
    many = 300

    def app(self, registry=None, **options):
        of = {"harness": self}
        rules = [
            (self.user, TornadoUser, of), (self.static, TornadoPlain), ("/gone", TornadoGone),
            ("/broken", TornadoBroken), ("/cut", TornadoStream, of), ("/stream", TornadoStream, of),
            ("/endless", TornadoEndless), ("/health", TornadoPlain), ("/healthy", TornadoPlain),
        ]  # fmt: skip
        return tornado.instrument(web.Application(rules), registry, **options)

    def ask(self, app, path, method="GET", body=b"", **headers):
        replies = []

        async def scenario(client):
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            got = await client.fetch(path, method, body=body or None, headers=fields)
            replies.append(Reply(got.code, {k.lower(): v for k, v in got.headers.items()}, got.body or b""))

        tornado_server.serving(app, scenario)
        return replies[0]

    def ask_all(self, app, requests):
        tornado_server.fetching(app, *[(method, path) for path, method in requests])

    def leave(self, app, registry):
        async def scenario(client):
            reader, writer = await client.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"x")
            writer.close()
            await tornado_server.until(lambda: active(registry) == 0, "the request has ended")

        tornado_server.serving(app, scenario)

    @staticmethod
    def path_of(source):
        return source.path

    @staticmethod
    def header_of(source, name):
        return source.headers.get(name)


class TornadoPlain(web.RequestHandler):
    def get(self, *arguments):
        self.write("hello")

    post = get


class TornadoUser(web.RequestHandler):
    def initialize(self, harness):
        self.harness = harness

    def get(self, number):
        self.harness.during()
        self.write("hello")

    head = post = get


class TornadoGone(web.RequestHandler):
    def get(self):
        self.set_status(410)


class TornadoBroken(web.RequestHandler):
    def get(self):
        raise Broken


class TornadoStream(web.RequestHandler):
    def initialize(self, harness):
        self.harness = harness

    async def get(self):
        for piece in self.harness.cut() if self.request.path == "/cut" else self.harness.pieces():
            self.write(piece)
            await self.flush()


class TornadoEndless(web.RequestHandler):
    async def get(self):
        self.gone = asyncio.Event()
        self.write("x")
        await self.flush()
        await self.gone.wait()

    def on_connection_close(self):
        self.gone.set()


HARNESSES = {"wsgi": WSGI, "flask": Flask, "asgi": ASGI, "asgi-trio": Trio, "tornado": Tornado}
