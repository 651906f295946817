"""FastAPI, with metrics for all of its workers.

uvicorn --workers 4 fastapi_app:app               # and the other servers of starlette_app.py
"""

import os

from fastapi import FastAPI

from tapes.contrib.asgi import TapesMiddleware

app = FastAPI()
app.add_middleware(TapesMiddleware, exclude=["/worker"])


@app.get("/hello/{name}")
async def hello(name: str):
    return f"Hello, {name}!"


@app.get("/worker")
async def worker():
    return os.getpid()
