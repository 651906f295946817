"""An application of Starlette with routes, mounts and hosts."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router
from starlette.staticfiles import StaticFiles


async def hello(request):
    return PlainTextResponse("hello")


async def broken(request):
    raise RuntimeError("broken")


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
