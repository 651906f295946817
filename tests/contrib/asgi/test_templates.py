"""The route templates of ASGI frameworks: full, nested, and never a raw path."""

from __future__ import annotations

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from tapes.contrib.asgi import TapesMiddleware
from tests.contrib.asgi.server import ask, plain
from tests.contrib.asgi.shop import TEMPLATES, hello, shop
from tests.contrib.recorded import active, counts


def forgetful(app):
    """Leave no route in the scope, as versions of Starlette before 1.10 do."""

    async def forgetting(scope, receive, send):
        async def sending(message):
            scope.pop("route", None)
            await send(message)

        await app(scope, receive, sending)

    return forgetting


@pytest.mark.parametrize("wrap", [lambda app: app, forgetful], ids=["route", "endpoint alone"])
@pytest.mark.parametrize("root_path", ["", "/behind/proxy"])
def test_templates_of_starlette(registry, tmp_path, root_path, wrap):
    """Templates are full and nested, with and without a root_path, in new and old versions of Starlette."""
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
    """Included routers with prefixes, mounted applications and plain routes have their full templates."""
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
    """Leave in the scope the path below a mount, as versions of Starlette before 0.33 do."""

    async def cutting(scope, receive, send):
        async def sending(message):
            scope.pop("route", None)
            scope["path"] = "/" + scope["path"].rpartition("/")[2]
            await send(message)

        await app(scope, receive, sending)

    return cutting


@pytest.mark.parametrize("wrap", [lambda app: app, forgetful, cuts_the_path], ids=["1.10", "1.0", "0.27"])
def test_one_endpoint_on_several_routes(registry, wrap):
    """If several routes share an endpoint, the original path decides, also where a mount is wrapped."""

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


def test_applications_of_other_frameworks_name_their_routes(registry):
    """A framework that tapes does not know leaves its template in the scope, or ``route`` names it."""

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
