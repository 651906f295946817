"""Two adapters around one application count its requests once, and a hidden /metrics is logged."""

from __future__ import annotations

import logging
import xmlrpc.client

import anyio
import flask
import pytest
from fastapi import FastAPI
from litestar import Litestar
from litestar import get as litestar_get
from starlette.applications import Starlette
from starlette.routing import Mount, Route, WebSocketRoute
from tornado import web
from werkzeug.local import LocalProxy
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import tapes
from tapes.contrib.asgi import TapesMiddleware
from tapes.contrib.flask import Tapes
from tapes.contrib.tornado import MetricsHandler, instrument
from tapes.contrib.wsgi import TapesMiddleware as WSGIMiddleware
from tests.contrib.asgi.server import Answer, ask, plain, receiving, scope_of
from tests.contrib.asgi.shop import hello, shop
from tests.contrib.copies import Copying, copied
from tests.contrib.recorded import active, counts
from tests.contrib.tornado.server import fetching
from tests.contrib.wsgi.shop import answers, small_app
from tests.contrib.wsgi.shop import ask as ask_flask


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.WARNING, "tapes.contrib")


def lines(caplog, what):
    return [record.getMessage() for record in caplog.records if what in record.getMessage()]


def flask_twice(registry):
    app = small_app()
    Tapes(app, registry)
    return WSGIMiddleware(app, registry)


def flask_twice_within(registry):
    app = small_app()
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, registry)
    app.wsgi_app = copied(app.wsgi_app)
    Tapes(app, registry)
    return app


WSGI = {
    "extension in middleware": flask_twice,
    "middleware in extension, with a copy between": flask_twice_within,
    "three": lambda registry: WSGIMiddleware(WSGIMiddleware(flask_twice(registry), registry), registry),
}


@pytest.mark.parametrize("kind", WSGI)
def test_two_adapters_around_a_wsgi_application(registry, caplog, kind):
    """The outer adapter records each request once, with its route; each inner one logs one line."""
    app = WSGI[kind](registry)
    for path in ("/users/7", "/users/8", "/nothing"):
        ask_flask(app, path)
    assert counts(registry) == {("GET", "/users/<user>", "200"): 2, ("GET", "<unmatched>", "404"): 1}
    assert active(registry) == 0
    assert len(lines(caplog, "two adapters")) == (3 if kind == "three" else 1)


def starlette_twice(registry):
    app = shop()
    app.add_middleware(TapesMiddleware, registry=registry)
    return TapesMiddleware(app, registry)


ASGI = {
    "in code and around": starlette_twice,
    "directly": lambda registry: TapesMiddleware(TapesMiddleware(shop(), registry), registry),
    "with a copy between": lambda registry: TapesMiddleware(Copying(starlette_twice(registry)), registry),
}


@pytest.mark.parametrize("kind", ASGI)
def test_two_adapters_around_an_asgi_application(registry, caplog, kind):
    """The outer adapter records each request once, with its route; each inner one logs one line."""
    app = ASGI[kind](registry)
    for path in ("/users/7", "/shop/items/8", "/nothing"):
        ask(app, path)
    assert counts(registry) == {
        ("GET", "/users/{user}", "200"): 1,
        ("GET", "/shop/items/{item}", "200"): 1,
        ("GET", "<unmatched>", "404"): 1,
    }
    assert active(registry) == 0
    assert len(lines(caplog, "two adapters")) == (2 if kind == "with a copy between" else 1)


def test_two_adapters_around_a_websocket(registry):
    """With two adapters, the handshake, the messages and the connection of a websocket count once."""

    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/echo", echo)])
    app = TapesMiddleware(TapesMiddleware(app, registry), registry)
    messages = {"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x"}
    scope = {**scope_of("/echo"), "type": "websocket", "scheme": "ws"}
    anyio.run(app, scope, receiving(*messages), Answer().send)
    assert counts(registry) == {("GET", "/echo", "101"): 1}
    stats = registry.get_stats().websocket.server
    assert [stats.messages[f'{{direction="{way}",route="/echo"}}'].value for way in ("received", "sent")] == [
        1,
        1,
    ]
    (connection,) = stats.connection.duration.values()
    assert connection["count"] == 1


@pytest.mark.parametrize("inner", ["prefix", "registry"])
@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_adapters_with_metrics_of_their_own_both_record(registry, caplog, protocol, inner):
    """The adapter of a mounted application records too if its prefix or its registry is another one."""
    other = registry if inner == "prefix" else tapes.Registry()
    options = {"prefix": "sub"} if inner == "prefix" else {}
    if protocol == "wsgi":
        sub = WSGIMiddleware(small_app(), other, **options)
        app = WSGIMiddleware(DispatcherMiddleware(small_app(), {"/sub": sub}), registry)
        ask_flask(app, "/sub/users/7")
        expected = [("GET", "/sub/users/<user>", "200"), "/users/<user>"]
    else:
        sub = TapesMiddleware(shop(), other, **options)
        app = TapesMiddleware(Starlette(routes=[Mount("/sub", sub)]), registry)
        ask(app, "/sub/users/7")
        expected = [("GET", "/sub/users/{user}", "200"), "/users/{user}"]
    assert counts(registry) == {expected[0]: 1}
    name = "sub.http.server.request.duration" if inner == "prefix" else "http.server.request.duration"
    (series,) = other.snapshot().series(name)
    assert (dict(series.labels)["route"], series.count) == (expected[1], 1)
    assert not lines(caplog, "two adapters")


@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_applications_beside_each_other_and_requests_in_a_row(registry, caplog, protocol):
    """Adapters with the same metrics that are not within each other all record, and log nothing."""
    if protocol == "wsgi":
        one, two = (WSGIMiddleware(answers, registry) for _ in range(2))
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/200"}
        for app in (one, two, one):
            assert list(app(environ, lambda *_: None)) == [b""]
    else:
        one, two = (TapesMiddleware(plain, registry) for _ in range(2))
        scope = scope_of()

        async def main():
            for app in (one, two, one):
                await app(scope, receiving(), Answer().send)

        anyio.run(main)
    assert counts(registry) == {("GET", "<unmatched>", "200"): 3}
    assert not lines(caplog, "two adapters")


def test_an_inner_adapter_answers_at_a_path_of_its_own(registry):
    """If the outer adapter has no path for the metrics, the inner one answers, and the request counts."""
    app = WSGIMiddleware(WSGIMiddleware(answers, registry), registry, metrics_path=None)
    assert ask_flask(app, "/metrics") == 200
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}


def test_a_lone_adapter_leaves_nothing_in_the_scope(registry):
    """An adapter that shares its metrics with no other one leaves the scope as it is."""
    seen = []

    async def app(scope, receive, send):
        seen.append(dict(scope))
        await plain(scope, receive, send)

    scope = scope_of()
    anyio.run(TapesMiddleware(app, registry), scope, receiving(), Answer().send)
    assert seen == [scope_of()]


def flask_with(path):
    app = small_app()
    app.add_url_rule(path, "own", lambda **_: "own")
    return app


def django_prometheus_like(app):
    return DispatcherMiddleware(app, {"/metrics": answers})


def shop_with(route):
    return Starlette(routes=[route])


async def own(scope, receive, send):
    await plain(scope, receive, send)


def fastapi_with_metrics():
    app = FastAPI()
    app.add_api_route("/metrics", lambda: "own")
    return app


HIDDEN = {
    "flask": lambda registry: WSGIMiddleware(flask_with("/metrics"), registry),
    "flask, with a slash": lambda registry: WSGIMiddleware(flask_with("/metrics/"), registry),
    "flask, behind middleware": lambda registry: WSGIMiddleware(copied(flask_with("/metrics")), registry),
    "dispatcher": lambda registry: WSGIMiddleware(django_prometheus_like(small_app()), registry),
    "dispatcher, of a framework": lambda registry: WSGIMiddleware(
        DispatcherMiddleware(flask_with("/metrics"), {}), registry
    ),
    "starlette": lambda registry: TapesMiddleware(Starlette(routes=[Route("/metrics", hello)]), registry),
    "starlette, mounted": lambda registry: TapesMiddleware(shop_with(Mount("/metrics", own)), registry),
    "starlette, in a mount": lambda registry: TapesMiddleware(
        Copying(Starlette(routes=[Mount("/", routes=[Route("/metrics", hello)])])), registry
    ),
    "fastapi": lambda registry: TapesMiddleware(fastapi_with_metrics(), registry),
}  # fmt: skip
NOT_HIDDEN = {
    "flask": lambda registry: WSGIMiddleware(small_app(), registry),
    "flask, any path": lambda registry: WSGIMiddleware(flask_with("/<path:any>"), registry),
    "flask, elsewhere": lambda registry: WSGIMiddleware(
        flask_with("/metrics"), registry, metrics_path="/tapes"
    ),
    "flask, nowhere": lambda registry: WSGIMiddleware(flask_with("/metrics"), registry, metrics_path=None),
    "starlette": lambda registry: TapesMiddleware(shop(), registry),
    "starlette, below": lambda registry: TapesMiddleware(
        Starlette(routes=[Mount("/sub", routes=[Route("/metrics", hello)]), Mount("/", own)]), registry
    ),
    "nothing known": lambda registry: TapesMiddleware(plain, registry),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/users/7", "/metrics"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_a_route_that_the_adapter_hides_is_logged_once(registry, caplog, kind, path):
    """The first request, for any path, logs a hidden route once, and names the option to change."""
    app = HIDDEN[kind](registry)
    asks = ask if isinstance(app, TapesMiddleware) else ask_flask
    for _ in range(3):
        asks(app, path)
    (line,) = lines(caplog, "metrics_path")
    assert "/metrics" in line


@pytest.mark.parametrize("kind", NOT_HIDDEN)
def test_nothing_is_logged_where_nothing_is_hidden(registry, caplog, kind):
    """A route for any path is not hidden, and another ``metrics_path`` hides nothing."""
    app = NOT_HIDDEN[kind](registry)
    asks = ask if isinstance(app, TapesMiddleware) else ask_flask
    asks(app, "/metrics")
    asks(app, "/users/7")
    assert not lines(caplog, "metrics_path")


def test_the_extension_of_flask_sees_routes_that_are_added_later(registry, caplog):
    """The extension of Flask sees hidden routes that are added after it is made."""
    app = flask.Flask("shop")
    Tapes(app, registry)
    app.add_url_rule("/metrics", "own", lambda: "own")
    assert not lines(caplog, "metrics_path")
    ask_flask(app, "/metrics")
    assert len(lines(caplog, "metrics_path")) == 1


def test_routes_that_the_lifespan_adds(registry, caplog):
    """A hidden route that is added in the lifespan is logged when the application has started."""
    app = Starlette()

    async def starting(scope, receive, send):
        if scope["type"] == "lifespan":
            app.router.routes.append(Route("/metrics", hello))
        await app(scope, receive, send)

    async def main():
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        messages = {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}
        await TapesMiddleware(starting, registry)(scope, receiving(*messages), Answer().send)

    anyio.run(main)
    assert len(lines(caplog, "metrics_path")) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_hidden_route_of_litestar(registry, caplog):
    """A hidden route of Litestar is logged once."""

    @litestar_get("/metrics")
    async def metrics() -> str:
        return "own"

    app = TapesMiddleware(Litestar([metrics], logging_config=None), registry)
    ask(app, "/nothing")
    assert len(lines(caplog, "metrics_path")) == 1


class Own(web.RequestHandler):
    def get(self, *arguments):
        self.write("own")


@pytest.mark.parametrize(
    ("rules", "number"),
    [
        ([(r"/metrics", Own)], 1),
        ([(r"/metrics/?", Own)], 1),
        ([(r"/x", web.Application([(r"/metrics", Own)]))], 0),
        ([(r"/metrics", MetricsHandler)], 0),
        ([(r"/(.*)", Own)], 0),
        ([(r".*", Own)], 0),
    ],
)
def test_a_hidden_rule_of_tornado(registry, caplog, rules, number):
    """A rule of Tornado for exactly the path of the metrics is logged once, unless tapes answers there."""
    application = instrument(web.Application(rules), registry)
    fetching(application, ("GET", "/nothing"), ("GET", "/metrics"))
    assert len(lines(caplog, "metrics_path")) == number


def test_requests_that_an_application_makes_to_another_one_of_the_process_count_too(registry, caplog):
    """Each part of a batch counts as a request, also if it gets a copy of the environ of the whole."""
    items = flask.Flask("items")
    items.add_url_rule("/item/<int:n>", view_func=lambda n: str(n), endpoint="item")
    items.wsgi_app = WSGIMiddleware(items.wsgi_app, registry)
    batch = flask.Flask("batch")

    @batch.get("/batch")
    def whole():
        for number in range(3):
            environ = {**flask.request.environ, "PATH_INFO": f"/item/{number}"}
            list(items.wsgi_app(environ, lambda *_: None))
        return "done"

    batch.wsgi_app = WSGIMiddleware(batch.wsgi_app, registry)
    assert batch.test_client().get("/batch").status_code == 200
    assert counts(registry) == {("GET", "/batch", "200"): 1, ("GET", "/item/<int:n>", "200"): 3}
    assert lines(caplog, "two adapters") == []


class Unready:
    """Raises an error for every attribute."""

    def __init__(self, app):
        self._app = app

    def __getattr__(self, name):
        raise RuntimeError(f"not configured: {name}")

    def __call__(self, environ, start_response):
        return self._app(environ, start_response)


def holding(app, other):
    def middleware(environ, start_response):
        assert other is not None
        return app(environ, start_response)

    return middleware


@pytest.mark.parametrize(
    "wrap",
    [
        Unready,
        lambda app: holding(app, flask.current_app),
        lambda app: holding(app, LocalProxy(lambda: 1 / 0)),
        lambda app: holding(app, xmlrpc.client.ServerProxy("http://127.0.0.1:1/")),
    ],
    ids=["own __getattr__", "current_app", "LocalProxy", "ServerProxy"],
)
def test_objects_that_raise_for_any_attribute_do_not_keep_an_adapter_from_being_made(registry, wrap):
    """An adapter can be made around objects that raise an error for every attribute."""
    app = small_app()
    app.wsgi_app = WSGIMiddleware(wrap(app.wsgi_app), registry)
    assert app.test_client().get("/").status_code in (200, 404)
