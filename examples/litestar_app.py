"""Litestar, with metrics for all of its workers; the adapter finds the route's template in the scope.

uvicorn --workers 4 litestar_app:app
"""

import os

from litestar import Litestar, get

from tapes.contrib.asgi import TapesMiddleware


@get("/hello/{name:str}")
async def hello(name: str) -> str:
    return f"Hello, {name}!\n"


@get("/worker")
async def worker() -> str:
    return f"{os.getpid()}\n"


app = TapesMiddleware(Litestar([hello, worker]), exclude=["/worker"])
