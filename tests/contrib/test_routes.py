"""Routes are found where middleware passes on copies, and it is logged where they can't be found."""

from __future__ import annotations

import copy
import functools
import logging

import flask
import pytest
from fastapi import APIRouter, FastAPI
from litestar import Litestar
from litestar import get as litestar_get
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.wrappers import Request

from tapes.contrib.asgi import TapesMiddleware
from tapes.contrib.flask import Tapes
from tapes.contrib.wsgi import TapesMiddleware as WSGIMiddleware
from tests.contrib.asgi.server import ask, plain
from tests.contrib.asgi.shop import TEMPLATES, hello, shop
from tests.contrib.copies import Copying, copied, copying_function
from tests.contrib.recorded import active, counts
from tests.contrib.wsgi.shop import answers, small_app
from tests.contrib.wsgi.shop import ask as ask_flask
from tests.processes import EXAMPLES, run_python

WRAPS = {
    "class": Copying,
    "closure": copying_function,
    "several": lambda app: Copying(copying_function(Copying(app))),
    "deep copy": lambda app: Copying(
        app, lambda scope: {**scope, "headers": copy.deepcopy(scope["headers"])}
    ),
    "partial": lambda app: functools.partial(Copying(app).__call__),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("path", TEMPLATES)
def test_templates_behind_a_copy_of_the_scope(registry, tmp_path, wrap, path):
    """Behind a copy of the scope, requests have the same templates as without it."""
    (tmp_path / "file.txt").write_text("text")
    ask(TapesMiddleware(WRAPS[wrap](shop(tmp_path)), registry), path)
    ((method, route, _),) = counts(registry)
    assert (method, route) == ("GET", TEMPLATES[path])


@pytest.mark.parametrize("root_path", ["", "/v1"])
def test_a_copy_below_a_root_path(registry, root_path):
    """Behind a copy of the scope, the root path is not part of the template."""
    ask(TapesMiddleware(Copying(shop()), registry), root_path + "/shop/items/7", root_path=root_path)
    assert counts(registry) == {("GET", "/shop/items/{item}", "200"): 1}


def test_methods_that_do_not_match_and_hosts(registry):
    """A 405 has the route that matches except for its method; the host decides between routers."""
    one = Router([Route("/{one}", hello)])
    two = Router([Route("/{two}", hello)])
    app = Starlette(
        routes=[
            Host("one.example", one),
            Host("two.example", two),
            Route("/thing/{n}", hello, methods=["POST"]),
            Route("/thing/{m}", hello, methods=["PUT"]),
        ]
    )
    measured = TapesMiddleware(Copying(app), registry)
    for host in (b"one.example", b"two.example"):
        ask(measured, "/x", headers=[(b"host", host)])
    ask(measured, "/thing/1")
    ask(measured, "/thing/1", "PUT")
    assert counts(registry) == {
        ("GET", "/{one}", "200"): 1,
        ("GET", "/{two}", "200"): 1,
        ("GET", "/thing/{n}", "405"): 1,
        ("PUT", "/thing/{m}", "200"): 1,
    }


def fastapi_app():
    app, router, inner = FastAPI(), APIRouter(), APIRouter()

    @app.get("/users/{n}")
    async def user(n: int):
        return n

    @inner.get("/deep/{m}")
    async def deep(m: int):
        return m

    router.include_router(inner, prefix="/in")
    app.include_router(router, prefix="/out/{tenant}")
    app.mount("/sub", shop())
    return app


@pytest.mark.parametrize("place", ["around", "inside"])
def test_templates_of_fastapi_behind_a_copy(registry, place):
    """Included routers and mounted applications of FastAPI keep their templates, wherever the adapter is."""
    app = fastapi_app()
    if place == "inside":
        app.add_middleware(Copying)
        app.add_middleware(TapesMiddleware, registry=registry)
    else:
        app = TapesMiddleware(Copying(app), registry)
    for path in ("/users/1", "/out/acme/in/deep/2", "/sub/shop/items/7", "/nothing"):
        ask(app, path)
    assert counts(registry) == {
        ("GET", "/users/{n}", "200"): 1,
        ("GET", "/out/{tenant}/in/deep/{m}", "200"): 1,
        ("GET", "/sub/shop/items/{item}", "200"): 1,
        ("GET", "<unmatched>", "404"): 1,
    }


def test_a_copy_within_a_mount(registry):
    """If a mount passes on a copy of the scope, the adapter finds the part of the template below it."""
    inner = Starlette(routes=[Route("/items/{item}", hello)], middleware=[Middleware(Copying)])
    app = TapesMiddleware(Starlette(routes=[Mount("/a/{b}", Copying(inner))]), registry)
    for path in ("/a/1/items/2", "/a/1/nothing"):
        ask(app, path)
    assert counts(registry) == {("GET", "/a/{b}/items/{item}", "200"): 1, ("GET", "<unmatched>", "404"): 1}


def test_base_http_middleware(registry):
    """Behind BaseHTTPMiddleware, which passes on the scope, a request has its template."""

    class Passing(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            return await call_next(request)

    app = shop()
    app.add_middleware(Passing)
    app.add_middleware(Copying)
    app.add_middleware(Passing)
    ask(TapesMiddleware(app, registry), "/users/7")
    assert counts(registry) == {("GET", "/users/{user}", "200"): 1}


def test_a_middleware_that_answers_itself(registry):
    """An answer of a middleware has the template of the route that would have answered."""

    def refusing(app):
        async def call(scope, receive, send):
            if scope["path"] == "/users/8":
                await PlainTextResponse("no", 401)(scope, receive, send)
            else:
                await app(scope, receive, send)

        return call

    app = TapesMiddleware(refusing(shop()), registry)
    for path in ("/users/7", "/users/8"):
        ask(app, path)
    assert counts(registry) == {("GET", "/users/{user}", "200"): 1, ("GET", "/users/{user}", "401"): 1}


def test_a_router_that_found_nothing_is_not_asked_again(registry, monkeypatch):
    """An unmatched request costs no second search, unless the router got a copy of the scope."""
    searched = []
    monkeypatch.setattr("tapes.contrib._applications.template_of", lambda *_: searched.append(1))
    ask(TapesMiddleware(shop(), registry), "/nothing/here")
    assert not searched
    ask(TapesMiddleware(Copying(shop()), registry), "/nothing/here")
    assert searched


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda app: app, Copying])
def test_litestar_needs_no_callable(registry, wrap):
    """Litestar leaves its template in the scope; behind a copy the adapter asks its router."""

    @litestar_get("/hello/{name:str}")
    async def greet(name: str) -> str:
        return name

    app = TapesMiddleware(wrap(Litestar([greet])), registry)
    for path in ("/hello/bob", "/nothing"):
        ask(app, path)
    assert counts(registry) == {("GET", "/hello/{name}", "200"): 1, ("GET", "<unmatched>", "404"): 1}


DJANGO = """
import os
from django.conf import settings
from django.http import HttpResponse
from django.urls import include, path

settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF="__main__", SECRET_KEY="x", MIDDLEWARE=[])
urlpatterns = [path("users/<int:n>", lambda request, n: HttpResponse("x")),
               path("in/", include([path("deep/<name>", lambda request, name: HttpResponse("x"))]))]

import django
import tapes
from tests.contrib.asgi.server import ask
from tests.contrib.copies import copied
from tests.contrib.recorded import counts
from tests.contrib.wsgi.shop import ask as ask_wsgi

registry = tapes.Registry()
django.setup()
if os.environ["PROTOCOL"] == "wsgi":
    from django.core.wsgi import get_wsgi_application
    from tapes.contrib.wsgi import TapesMiddleware
    app = TapesMiddleware(copied(get_wsgi_application()), registry)
    ask = ask_wsgi
else:
    from django.core.asgi import get_asgi_application
    from tapes.contrib.asgi import TapesMiddleware
    app = TapesMiddleware(get_asgi_application(), registry)
for where in ("/users/7", "/in/deep/x", "/nothing"):
    ask(app, where)
print(counts(registry) == {
    ("GET", "/users/<int:n>", "200"): 1,
    ("GET", "/in/deep/<name>", "200"): 1,
    ("GET", "<unmatched>", "404"): 1,
} or counts(registry))
"""


@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_django_needs_no_middleware(protocol):
    """Django's templates are found without a middleware, under WSGI and ASGI."""
    done = run_python(DJANGO, cwd=EXAMPLES.parent, PROTOCOL=protocol)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def rebuilt(kind):
    """A middleware that builds another request from the environ that Flask gets, after Flask has its own."""

    def wrap(app):
        def call(environ, start_response):
            def starting(*arguments):
                kind(environ)
                return start_response(*arguments)

            return app(environ, starting)

        return call

    return wrap


def late(app):
    """A middleware that starts the answer when the application has returned."""

    def call(environ, start_response):
        seen = []
        body = app(environ, lambda *arguments: seen.append(arguments) or (lambda data: None))
        start_response(*seen[0])
        return body

    return call


WSGI_WRAPS = {
    "copy": copied,
    "werkzeug request": rebuilt(Request),
    "flask request": rebuilt(flask.Request),
    "late": late,
    "late copy": lambda app: copied(late(copied(app))),
    "proxy": lambda app: ProxyFix(copied(app)),
}


@pytest.mark.parametrize("options", [{}, {"body_sizes": True}, {"labels": lambda environ: {}}])
@pytest.mark.parametrize("wrap", WSGI_WRAPS)
def test_flask_behind_middleware(registry, wrap, options):
    """The route survives a copy of the environ, a request that is built again, and a late start."""
    app = small_app()
    app.add_url_rule("/gone/<n>", "gone", lambda n: flask.abort(410))
    app.wsgi_app = WSGIMiddleware(WSGI_WRAPS[wrap](app.wsgi_app), registry, **options)
    for path in ("/users/7", "/gone/1", "/nothing"):
        ask_flask(app, path)
    assert counts(registry) == {
        ("GET", "/users/<user>", "200"): 1,
        ("GET", "/gone/<n>", "410"): 1,
        ("GET", "<unmatched>", "404"): 1,
    }


def test_a_view_that_builds_a_request_from_its_environ(registry):
    """A view that builds another request from its environ keeps the route of Flask's own request."""
    app = small_app()
    app.add_url_rule("/again/<n>", "again", lambda n: Request(flask.request.environ).method)
    Tapes(app, registry)
    ask_flask(app, "/again/1")
    assert counts(registry) == {("GET", "/again/<n>", "200"): 1}


@pytest.mark.parametrize("wrap", ["copy", "late", "late copy"])
def test_views_and_exceptions_behind_middleware(registry, wrap):
    """Behind middleware, excluded views stay excluded, and an exception that leaves Flask has its route."""
    app = small_app()
    app.testing = True

    @app.get("/quiet")
    @Tapes.exclude
    def quiet():
        return "x"

    @app.get("/broken/<n>")
    def broken(n):
        raise RuntimeError("broken")

    app.wsgi_app = WSGI_WRAPS[wrap](app.wsgi_app)
    Tapes(app, registry)
    ask_flask(app, "/quiet")
    with pytest.raises(RuntimeError, match="broken"):
        ask_flask(app, "/broken/1")
    assert counts(registry) == {("GET", "/broken/<n>", "500"): 1}
    assert active(registry) == 0


def test_templates_below_a_dispatcher_behind_a_copy(registry):
    """Behind a copy of the environ, the mount of an application is part of its template."""
    inner = DispatcherMiddleware(copied(small_app()), {"/api": copied(small_app("api"))})
    app = WSGIMiddleware(inner, registry)
    for path in ("/users/7", "/api/nothing"):
        ask_flask(app, path)
    assert counts(registry) == {("GET", "/users/<user>", "200"): 1, ("GET", "<unmatched>", "404"): 1}


def unmatched_lines(caplog):
    return [record.getMessage() for record in caplog.records if "<unmatched>" in record.getMessage()]


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_answers_without_a_route_are_logged_once(registry, caplog, kind):
    """100 answers of status 200 in a row without a route are logged once, with what to do."""
    if kind == "wsgi":
        app, once = WSGIMiddleware(answers, registry), lambda: ask_flask(app, "/200")
    else:
        app, once = TapesMiddleware(plain, registry), lambda: ask(app, "/200")
    with caplog.at_level(logging.WARNING, "tapes.contrib"):
        for _ in range(99):
            once()
        assert not unmatched_lines(caplog)
        for _ in range(201):
            once()
    (line,) = unmatched_lines(caplog)
    assert "route=" in line
    assert "middleware" in line


def test_answers_that_are_no_reason_to_log(registry, caplog):
    """Other statuses, interrupted rows, and adapters with a ``route`` callable are not logged."""

    def some(environ, start_response):
        if environ["PATH_INFO"].endswith("201"):
            environ["tapes.route"] = "/known"
        return answers(environ, start_response)

    app = WSGIMiddleware(some, registry)
    with caplog.at_level(logging.WARNING, "tapes.contrib"):
        for _ in range(5):
            for _ in range(60):
                ask_flask(app, "/200")
            ask_flask(app, "/201")
        for _ in range(200):
            ask_flask(app, "/404")
        named = WSGIMiddleware(answers, registry, route=lambda environ: None)
        for _ in range(200):
            ask_flask(named, "/200")
    assert not unmatched_lines(caplog)
    assert counts(registry)["GET", "/known", "201"] == 5
    with caplog.at_level(logging.WARNING, "tapes.contrib"):
        for _ in range(200):
            ask_flask(app, "/200")
    assert len(unmatched_lines(caplog)) == 1
