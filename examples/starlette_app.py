"""Starlette, with metrics for all of its workers.

uvicorn --workers 4 starlette_app:app
hypercorn --workers 4 starlette_app:app
granian --interface asgi --workers 4 starlette_app:app
gunicorn -w 4 -k uvicorn_worker.UvicornWorker starlette_app:app
"""

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tapes.contrib.asgi import TapesMiddleware


async def hello(request):
    return PlainTextResponse(f"Hello, {request.path_params['name']}!\n")


async def worker(request):
    return PlainTextResponse(f"{os.getpid()}\n")


app = Starlette(
    routes=[Route("/hello/{name}", hello), Route("/worker", worker)],
    middleware=[Middleware(TapesMiddleware, exclude=["/worker"])],
)
