"""ASGI's TapesMiddleware: what it records, and that nobody notices it, on asyncio and on trio."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from enum import Enum
from functools import partial
from http import HTTPStatus

import anyio
import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles

import tapes
from tapes.contrib.asgi import TapesMiddleware
from tapes.errors import InvalidArgument
from tapes.session import LocalSession, Session
from tapes.testing import ManualClock
from tests.contrib.recorded import active, counts

BACKENDS = ("asyncio", "trio")


@pytest.fixture
def registry():
    return tapes.Registry()


class Connected(Session):
    """A session that is connected."""

    is_connected = True


class Answer:
    """What a server got from an application."""

    def __init__(self):
        self.messages = []

    async def send(self, message):
        self.messages.append(message)

    def _of(self, kind):
        return [message for message in self.messages if message["type"] == kind]

    @property
    def status(self):
        return self._of("http.response.start")[0]["status"]

    @property
    def headers(self):
        return dict(self._of("http.response.start")[0]["headers"])

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self._of("http.response.body"))


def scope_of(path="/", method="GET", **more):
    path, _, query = path.partition("?")
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": method, "scheme": "http", "path": path, "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "headers": [(b"host", b"shop.example")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), **more,
    }  # fmt: skip


def receiving(*messages):
    """A server's receive(): these messages, then nothing any more."""
    left = list(messages)

    async def receive():
        if not left:
            await anyio.sleep_forever()
        return left.pop(0)

    return receive


def ask(app, path="/", method="GET", body=b"", backend="asyncio", **scope):
    """The answer to one request."""
    answer = Answer()
    receive = receiving({"type": "http.request", "body": body, "more_body": False})
    anyio.run(app, scope_of(path, method, **scope), receive, answer.send, backend=backend)
    return answer


async def hello(request):
    return PlainTextResponse("hello")


async def broken(request):
    raise RuntimeError("broken")


async def plain(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"plain"})


def shop(tmp_path=None):
    inner = Starlette(routes=[Route("/items/{item}", hello), Route("/broken", broken)])
    more = [Mount("/static", StaticFiles(directory=tmp_path))] if tmp_path else []
    return Starlette(
        routes=[
            Route("/", hello),
            Route("/users/{user}", hello, methods=["GET", "POST"]),
            Mount("/shop", inner),
            Mount("/tenants/{tenant}", Router([Mount("/deep", inner), Route("/{page:path}", hello)])),
            Host("api.{domain}", Router([Route("/v1/{thing}", hello)])),
            *more,
        ]
    )


TEMPLATES = {
    "/": "/",
    "/users/7": "/users/{user}",
    "/shop/items/7": "/shop/items/{item}",
    "/tenants/acme/deep/items/7": "/tenants/{tenant}/deep/items/{item}",
    "/tenants/acme/a/b/c": "/tenants/{tenant}/{page:path}",
    "/nothing/7": "<unmatched>",
    "/shop/nothing/7": "<unmatched>",
    "/static/file.txt": "/static/{path:path}",
    "/static/no.txt": "/static/{path:path}",
}


def forgetful(app):
    """Leaves what versions of Starlette before 1.10 leave: no route."""

    async def forgetting(scope, receive, send):
        async def sending(message):
            scope.pop("route", None)
            await send(message)

        await app(scope, receive, sending)

    return forgetting


@pytest.mark.parametrize("wrap", [lambda app: app, forgetful], ids=["route", "endpoint alone"])
@pytest.mark.parametrize("root_path", ["", "/behind/proxy"])
def test_templates_of_starlette(registry, tmp_path, root_path, wrap):
    """Full, nested, never raw; the same with and without a root_path, in new and old versions."""
    (tmp_path / "file.txt").write_text("text")
    app = TapesMiddleware(wrap(shop(tmp_path)), registry)
    for path in TEMPLATES:
        ask(app, root_path + path, root_path=root_path)
    ask(app, root_path + "/v1/cup", root_path=root_path, headers=[(b"host", b"api.example")])
    ask(app, root_path + "/users/7", "DELETE", root_path=root_path)
    ask(app, root_path + "/users/7", "BREW", root_path=root_path)
    found = counts(registry)
    status = {"/nothing/7": "404", "/shop/nothing/7": "404", "/static/no.txt": "404"}
    expected = {("GET", route, status.get(path, "200")): 1 for path, route in TEMPLATES.items()}
    expected["GET", "<unmatched>", "404"] = 2
    expected["GET", "/v1/{thing}", "200"] = 1
    expected["DELETE", "/users/{user}", "405"] = expected["_OTHER", "/users/{user}", "405"] = 1
    assert found == expected
    assert active(registry) == 0


def test_templates_of_fastapi(registry):
    """Routers with prefixes in routers, mounted applications of both kinds, plain routes."""
    app = FastAPI()
    outer, inner = APIRouter(prefix="/outer"), APIRouter(prefix="/inner/{part}")

    @inner.get("/x/{id}")
    @outer.get("/y/{id}")
    @app.get("/plain/{id}")
    def endpoint(id: int):
        return id

    sub = FastAPI()

    @sub.get("/z/{id}")
    def z(id: int):
        return id

    outer.include_router(inner)
    app.include_router(outer, prefix="/api/{tenant}")
    app.mount("/sub", sub)
    app.mount("/shop", shop())
    app.routes.append(Route("/starlette/{id}", hello))
    app.add_middleware(TapesMiddleware, registry)
    for path in (
        "/plain/1", "/api/acme/outer/y/1", "/api/acme/outer/inner/p/x/1", "/sub/z/1", "/shop/shop/items/1",
        "/shop/tenants/acme/deep/items/1", "/starlette/1", "/nothing", "/sub/nothing", "/plain/word",
    ):  # fmt: skip
        ask(app, path)
    assert counts(registry) == {
        ("GET", "/plain/{id}", "200"): 1,
        ("GET", "/api/{tenant}/outer/y/{id}", "200"): 1,
        ("GET", "/api/{tenant}/outer/inner/{part}/x/{id}", "200"): 1,
        ("GET", "/sub/z/{id}", "200"): 1,
        ("GET", "/shop/shop/items/{item}", "200"): 1,
        ("GET", "/shop/tenants/{tenant}/deep/items/{item}", "200"): 1,
        ("GET", "/starlette/{id}", "200"): 1,
        ("GET", "<unmatched>", "404"): 2,
        ("GET", "/plain/{id}", "422"): 1,
    }


def cuts_the_path(app):
    """Leaves what mounts of versions of Starlette before 0.33 leave: the path below them."""

    async def cutting(scope, receive, send):
        async def sending(message):
            scope.pop("route", None)
            scope["path"] = "/" + scope["path"].rpartition("/")[2]
            await send(message)

        await app(scope, receive, sending)

    return cutting


@pytest.mark.parametrize("wrap", [lambda app: app, forgetful, cuts_the_path], ids=["1.10", "1.0", "0.27"])
def test_one_endpoint_on_several_routes(registry, wrap):
    """The path as it came decides; mounts may be wrapped in middleware."""

    class Passing:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            await self.app(scope, receive, send)

    inner = [Route("/items/{x}", hello)]
    routes = [Mount("/v1/{t}", routes=inner), Mount("/v2/{t}", app=Passing(Starlette(routes=inner))), *inner]
    app = TapesMiddleware(wrap(Starlette(routes=routes)), registry)
    for path in ("/v1/T/items/1", "/v2/T/items/1", "/items/1"):
        assert ask(app, path).status == 200
    assert counts(registry) == {
        ("GET", "/v1/{t}/items/{x}", "200"): 1,
        ("GET", "/v2/{t}/items/{x}", "200"): 1,
        ("GET", "/items/{x}", "200"): 1,
    }


def test_a_status_is_a_number_whatever_its_type(registry):
    """HTTPStatus.OK is 200."""

    class Status(int, Enum):
        OK = 200

    for status in (HTTPStatus.OK, Status.OK, 200):

        async def app(scope, receive, send, status=status):
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": None})

        ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "200"): 3}


def test_an_answer_whose_trailers_never_come_was_one(registry):
    """Its body was complete."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})

    ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}


def test_who_leaves_at_the_end_of_a_lifespan_joins_once_again(registry, monkeypatch):
    """Not with every request that comes after it."""
    app = TapesMiddleware(plain, registry)
    service, calls = app._adapter.service, []
    monkeypatch.setattr(type(service), "begin", lambda self: self.mark.__setitem__(0, 1) or True)
    monkeypatch.setattr(type(service), "join", lambda self: calls.append("join"))
    registry.use(Connected(registry))
    monkeypatch.setattr(
        type(service), "leave", lambda self: calls.append("leave") or self.mark.__setitem__(0, 0)
    )

    async def main():
        for _ in range(3):
            await app(scope_of(), receiving(), Answer().send)
        service.leave()
        for _ in range(3):
            await app(scope_of(), receiving(), Answer().send)

    anyio.run(main)
    assert calls == ["join", "leave", "join"]


def test_applications_of_other_frameworks_name_their_routes(registry):
    """route= or a word in the scope; what fails there is <unmatched>, and the request is answered."""

    async def app(scope, receive, send):
        if scope["path"] == "/a":
            scope["tapes.route"] = "/{letter}"
        await plain(scope, receive, send)

    for path in ("/a", "/b"):
        assert ask(TapesMiddleware(app, registry), path).body == b"plain"
    named = TapesMiddleware(app, registry, route=lambda scope: {"/c": "/see"}[scope["path"]])
    for path in ("/c", "/d"):
        assert ask(named, path).body == b"plain"
    assert counts(registry) == {
        ("GET", "/{letter}", "200"): 1,
        ("GET", "/see", "200"): 1,
        ("GET", "<unmatched>", "200"): 2,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_is_timed_to_its_last_byte_and_no_longer(backend):
    """1 s of stream counts 1 s; a background task that follows counts nothing."""
    clock = ManualClock(100.0)
    registry = tapes.Registry(clock=clock)

    async def numbers():
        for _ in range(4):
            clock.advance(0.25)
            yield b"x"

    async def stream(request):
        return StreamingResponse(numbers(), background=BackgroundTask(background))

    async def background():
        assert active(registry) == 0
        clock.advance(60.0)

    app = TapesMiddleware(Starlette(routes=[Route("/", stream)]), registry)
    assert ask(app, backend=backend).body == b"xxxx"
    (series,) = registry.snapshot().series("http.server.request.duration")
    assert (series.count, series.sum) == (1, 1.0)


def test_an_exception_before_the_answer_is_one_500_and_goes_on(registry):
    """The same object reaches the server."""
    error = KeyError("mine")

    async def app(scope, receive, send):
        raise error

    with pytest.raises(KeyError) as caught:
        ask(TapesMiddleware(app, registry))
    assert caught.value is error
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}
    assert active(registry) == 0


def test_an_exception_after_the_first_byte_is_one_500(registry):
    """Though 200 was sent."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}
    assert active(registry) == 0


def test_an_exception_after_the_last_byte_is_none(registry):
    """The client got its answer: of a background task that fails nothing is seen in it."""

    async def app(scope, receive, send):
        await plain(scope, receive, send)
        raise RuntimeError("too late")

    with pytest.raises(RuntimeError, match="too late"):
        ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}


@pytest.mark.parametrize("kinds", [(b"image/png", b"text/plain"), (b"text/plain", b"image/png")])
def test_several_accept_lines_are_one_list(registry, kinds):
    """The order of the lines does not decide which one is read."""
    app = TapesMiddleware(plain, registry)
    answer = ask(app, "/metrics", headers=[(b"accept", kind) for kind in kinds])
    assert answer.headers[b"content-type"].startswith(b"text/plain")


def test_only_the_first_1000_header_lines_are_looked_at(registry):
    """A request of many lines costs no more than one of 1,000."""
    app = TapesMiddleware(plain, registry)
    for lines, kind in ((999, b"text/plain"), (1000, b"application/json")):
        answer = ask(app, "/metrics", headers=[(b"a", b"b")] * lines + [(b"accept", b"text/plain")])
        assert answer.headers[b"content-type"].partition(b";")[0] == kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_clients_that_go_away_are_499(registry, backend):
    """Told by receive(), by an error of send(), or by a cancelled task."""

    async def listens(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    async def ignores(scope, receive, send):
        await receive()
        await receive()
        await plain(scope, receive, send)

    async def never_answers(scope, receive, send):
        await receive()
        await receive()

    async def waits(scope, receive, send):
        await anyio.sleep_forever()

    async def broken_pipe(message):
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    async def main():
        for app in (listens, ignores, never_answers):
            receive = receiving({"type": "http.request"}, {"type": "http.disconnect"})
            await TapesMiddleware(app, registry)(scope_of(), receive, Answer().send)
        with pytest.raises(BrokenPipeError):
            await TapesMiddleware(plain, registry)(scope_of(), receiving(), broken_pipe)
        with anyio.move_on_after(0.01):
            await TapesMiddleware(waits, registry)(scope_of(), receiving(), Answer().send)

    anyio.run(main, backend=backend)
    assert counts(registry) == {("GET", "<unmatched>", "499"): 5}
    assert active(registry) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_at_the_same_time_have_nothing_in_common(backend):
    """20 that overlap: each has its own status, route and duration, and all are active."""
    clock = ManualClock(100.0)
    registry = tapes.Registry(clock=clock)

    async def main():
        gates = [anyio.Event() for _ in range(20)]

        async def waiting(scope, receive, send):
            number = int(scope["path"][1:])
            scope["tapes.route"] = f"/{number % 2}"
            await gates[number].wait()
            await send({"type": "http.response.start", "status": 200 + number % 4, "headers": []})
            await send({"type": "http.response.body"})

        app = TapesMiddleware(waiting, registry)
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(app, scope_of(f"/{number}"), receiving(), Answer().send)
            await anyio.wait_all_tasks_blocked()
            assert active(registry) == 20
            for gate in reversed(gates):
                clock.advance(1.0)
                gate.set()
                await anyio.wait_all_tasks_blocked()

    anyio.run(main, backend=backend)
    expected = {("GET", f"/{number % 2}", str(200 + number)): 5 for number in range(4)}
    assert counts(registry) == expected
    assert sum(s.sum for s in registry.snapshot().series("http.server.request.duration")) == sum(range(1, 21))
    assert active(registry) == 0


def test_an_application_that_never_answers_is_a_500(registry):
    """As the server makes one of it."""

    async def app(scope, receive, send):
        pass

    ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}


ENDINGS = {
    "body": [{"type": "http.response.body", "body": b"x"}],
    "bodies": [
        {"type": "http.response.body", "body": b"x", "more_body": True},
        {"type": "http.response.body"},
    ],
    "pathsend": [{"type": "http.response.pathsend", "path": "/x"}],
    "zerocopysend": [
        {"type": "http.response.zerocopysend", "file": 3, "more_body": True},
        {"type": "http.response.zerocopysend", "file": 3},
    ],
    "trailers": [
        {"type": "http.response.body", "body": b"x"},
        {"type": "http.response.trailers", "headers": [], "more_trailers": True},
        {"type": "http.response.trailers", "headers": []},
    ],
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_message_and_scope_passes_through_as_it_is(registry, ending):
    """The same objects, extensions included, and the request ends with the last of them and not before."""
    start = {"type": "http.response.start", "status": 200, "trailers": ending == "trailers"}
    others = [{"type": "http.response.debug", "info": {}}, {"type": "http.response.push", "path": "/y"}]
    messages = [*others, start, *ENDINGS[ending]]
    request = {"type": "http.request", "body": b"in", "more_body": False}
    scope = {"type": "http", "method": "GET", "path": "/", "extensions": {"http.response.push": {}}}
    before, seen = dict(scope), []

    async def app(got_scope, receive, send):
        assert got_scope is scope
        assert scope == before
        assert await receive() is request
        for message in messages:
            assert active(registry) == 1
            await send(message)
            seen.append(counts(registry))

    answer = Answer()
    anyio.run(TapesMiddleware(app, registry), scope, receiving(request), answer.send)
    assert all(got is sent for got, sent in zip(answer.messages, messages))
    assert len(answer.messages) == len(messages)
    assert [bool(count) for count in seen] == [False] * (len(messages) - 1) + [True]


def test_scopes_without_optional_keys(registry):
    """Only the type is certain; headers may be an iterator, which is the application's to consume."""

    async def app(scope, receive, send):
        assert list(scope.get("headers", ())) in ([], [(b"a", b"b")])
        await plain(scope, receive, send)

    app = TapesMiddleware(app, registry)
    anyio.run(app, {"type": "http"}, receiving(), Answer().send)
    anyio.run(app, {"type": "http", "headers": iter([(b"a", b"b")])}, receiving(), Answer().send)
    assert sum(counts(registry).values()) == 2


def test_other_scopes_pass_through(registry):
    """Whatever a server invents."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    arguments = ({"type": "telepathy"}, receiving(), Answer().send)
    anyio.run(TapesMiddleware(app, registry), *arguments)
    assert seen == [arguments]


def test_the_lifespan_passes_through(registry):
    """Its messages, its state, and its errors."""

    async def app(scope, receive, send):
        assert (await receive())["type"] == "lifespan.startup"
        scope["state"]["db"] = 1
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        await send({"type": "lifespan.shutdown.complete"})

    async def has_none(scope, receive, send):
        raise ValueError("no lifespan")

    scope, answer = {"type": "lifespan", "state": {}}, Answer()
    receive = receiving({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    anyio.run(TapesMiddleware(app, registry), scope, receive, answer.send)
    assert [m["type"] for m in answer.messages] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert scope["state"] == {"db": 1}
    with pytest.raises(ValueError, match="no lifespan"):
        anyio.run(TapesMiddleware(has_none, registry), {"type": "lifespan"}, receiving(), Answer().send)


async def raises(scope, receive, send):
    raise ValueError("no lifespan")


async def returns(scope, receive, send):
    pass


async def starts_badly(scope, receive, send):
    await receive()
    raise ValueError("no database")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("application", [raises, returns, starts_badly])
def test_a_lifespan_that_the_application_does_not_know(registry, monkeypatch, application, backend):
    """Where there is a service to leave it is answered here; the application's own failures pass through."""
    registry.use(Connected(registry))
    calls = []
    app, answer = TapesMiddleware(application, registry), Answer()
    monkeypatch.setattr(type(app._adapter.service), "leave", lambda self: calls.append(len(answer.messages)))
    receive = receiving({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    with pytest.raises(ValueError, match="no database") if application is starts_badly else nullcontext():
        anyio.run(app, {"type": "lifespan"}, receive, answer.send, backend=backend)
    completed = ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert [m["type"] for m in answer.messages] == ([] if application is starts_badly else completed)
    assert calls == ([] if application is starts_badly else [1])


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
    """Handshakes are requests; how long a websocket stays open, and its messages, are not."""
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
    """An hour open: the request took no time, and nothing is active but the connection."""
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


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_are_mounted_with_and_without_a_slash(registry, path, backend):
    """JSON by default, no cache, not measured itself; HEAD; nothing but reading."""
    app = TapesMiddleware(shop(), registry)
    ask(app, "/users/7")
    answer = ask(app, path, backend=backend)
    assert answer.status == 200
    assert answer.headers[b"content-type"] == b"application/json"
    assert answer.headers[b"cache-control"] == b"no-store"
    assert answer.headers[b"content-length"] == str(len(answer.body)).encode()
    selector = '{method="GET",route="/users/{user}",status="200"}'
    assert json.loads(answer.body)["http"]["server"]["request"]["duration"][selector]["count"] == 1
    assert ask(app, path, "HEAD").body == b""
    assert ask(app, path, "POST").status == 405
    assert b"# EOF" in ask(app, path + "?format=openmetrics").body
    text = ask(app, path, headers=[(b"Accept", b"text/plain")])
    assert b"http_server_request_duration_seconds_count" in text.body
    assert set(counts(registry)) == {("GET", "/users/{user}", "200")}


def test_metrics_below_a_root_path(registry):
    """Servers leave the root_path in the path, or don't; it may end with a slash, or begin like the path."""
    app = TapesMiddleware(shop(), registry)
    for path in ("/metrics", "/behind/metrics"):
        for root_path in ("/behind", "/behind/"):
            assert ask(app, path, root_path=root_path).status == 200
    for root_path in ("/", "/m"):
        assert ask(app, "/metrics", root_path=root_path).status == 200


def test_who_may_read(registry, monkeypatch):
    """A guard, asynchronous or not, decides; one that fails lets nobody in; else a token, if one is set."""

    async def asynchronous(scope):
        return scope["query_string"] == b"please"

    async def failing(scope):
        raise RuntimeError

    async def forgetful(scope):
        pass

    for guard in (lambda scope: scope["query_string"] == b"please", asynchronous):
        app = TapesMiddleware(plain, registry, guard=guard)
        assert (ask(app, "/metrics").status, ask(app, "/metrics?please").status) == (403, 200)
    for guard in (lambda scope: 1 / 0, failing, forgetful, lambda scope: None):
        assert ask(TapesMiddleware(plain, registry, guard=guard), "/metrics").status == 403
    monkeypatch.setenv("TAPES_METRICS_TOKEN", "secret")
    app = TapesMiddleware(plain, registry)
    refused = ask(app, "/metrics")
    assert (refused.status, refused.headers[b"www-authenticate"]) == (401, b'Bearer realm="metrics"')
    assert ask(app, "/metrics", headers=[(b"authorization", b"Bearer wrong")]).status == 401
    assert ask(app, "/metrics", headers=[(b"authorization", b"Bearer secret")]).status == 200
    monkeypatch.setenv("TAPES_METRICS_TOKEN", "grün\n")
    assert ask(app, "/metrics", headers=[(b"authorization", "Bearer grün".encode())]).status == 200
    assert ask(app, "/metrics", headers=[(b"authorization", b"Bearer gr???n")]).status == 401
    monkeypatch.setenv("TAPES_METRICS_TOKEN", "")
    assert ask(app, "/metrics", headers=[(b"authorization", b"Bearer ")]).status == 403


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_event_loop_goes_on_while_the_aggregator_is_waited_for(registry, backend):
    """A slow answer to a reader holds up nobody else."""
    asked, let_go = threading.Event(), threading.Event()

    class Slow(Connected):
        def render(self, form, write):
            asked.set()
            assert let_go.wait(10)
            return b"{}"

    registry.use(Slow(registry))
    app = TapesMiddleware(plain, registry)

    async def main():
        async with anyio.create_task_group() as tasks:
            reader = Answer()
            tasks.start_soon(app, scope_of("/metrics"), receiving(), reader.send)
            while not asked.is_set():
                await anyio.sleep(0.001)
            answer = Answer()
            await app(scope_of(), receiving(), answer.send)
            assert answer.body == b"plain"
            assert not reader.messages
            let_go.set()
        assert reader.body == b"{}"

    try:
        anyio.run(main, backend=backend)
    finally:
        let_go.set()
        registry.use(LocalSession(registry))


def test_options(registry):
    """Excluded paths, labels, prefix, sizes."""

    async def reads(scope, receive, send):
        await receive()
        await plain(scope, receive, send)

    app = TapesMiddleware(
        reads, registry, exclude=["/health", "/static/*"], labels=lambda scope: {"host": scope["server"][0]},
        prefix="shop", body_sizes=True, metrics_path="/internal",
    )  # fmt: skip
    for path in ("/health", "/health/", "/static/x/y", "/metrics", "/healthy"):
        assert ask(app, path, "POST", b"12345").body == b"plain"
    assert ask(app, "/internal").status == 200
    snapshot = registry.snapshot()
    (series,) = snapshot.series("shop.http.server.request.duration")
    assert (series.count, dict(series.labels)["host"]) == (2, "127.0.0.1")
    labels = {"method": "POST", "route": "<unmatched>"}
    assert snapshot.get("shop.http.server.request.body.size", **labels).sum == 10
    assert snapshot.get("shop.http.server.response.body.size", **labels).sum == 2 * len("plain")
    for options in (
        {"metrics_path": "metrics"},
        {"exclude": ["health"]},
        {"guard": "secret"},
        {"route": "/"},
    ):
        with pytest.raises(InvalidArgument):
            TapesMiddleware(plain, registry, **options)
    with pytest.raises(InvalidArgument):
        TapesMiddleware(plain, "registry")


def test_a_failing_callable_of_the_user_does_not_break_the_request(registry, caplog):
    """It is said once; requests are answered, and counted without it."""
    app = TapesMiddleware(plain, registry, labels=lambda scope: 1 / 0)
    for _ in range(3):
        assert ask(app).body == b"plain"
    assert counts(registry) == {("GET", "<unmatched>", "200"): 3}
    assert len([r for r in caplog.records if "labels" in r.getMessage()]) == 1
    assert active(registry) == 0


def test_turned_off_nothing_is_measured(registry, monkeypatch):
    """TAPES_DISABLED: the application is called as it is; the metrics say that they are off."""
    monkeypatch.setenv("TAPES_DISABLED", "1")
    app = TapesMiddleware(plain, registry)
    assert ask(app).body == b"plain"
    assert (ask(app, "/metrics").status, counts(registry)) == (503, {})


def test_invented_paths_and_methods_make_no_more_series(registry):
    """10,000 paths, 500 methods and 500 close codes: one series each."""
    app = TapesMiddleware(shop(), registry)

    async def main():
        for number in range(10_000):
            await app(scope_of(f"/no/{number}"), receiving(), Answer().send)
        for number in range(500):
            headers = [(f"x-{n}".encode(), b"y") for n in range(100)]
            await app(scope_of("/", f"M{number}", headers=headers), receiving(), Answer().send)

    anyio.run(main)
    assert counts(registry) == {("GET", "<unmatched>", "404"): 10_000, ("_OTHER", "/", "405"): 500}
    sockets = TapesMiddleware(Starlette(routes=[WebSocketRoute("/", echo)]), registry)
    for code in range(3000, 3500):
        open_socket(sockets, "/", {"type": "websocket.disconnect", "code": code})
    (closed,) = registry.snapshot().series("websocket.server.connection.duration")
    assert (closed.count, dict(closed.labels)["code"]) == (500, "_OTHER")
