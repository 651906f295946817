"""What an adapter adds to a request: in process, over the bare application, and under gunicorn.

In process, the bare application and the measured ones take turns in slices of some milliseconds; what is kept
is the difference to the bare slice beside it. Under gunicorn, a server with metrics and one without answer
short bursts of ``ab`` in turns; processor time is that of all their processes, aggregator included.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import os
import pathlib
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from questions import Row

import tapes

__all__ = ["adapters", "under_gunicorn"]

ROUNDS = 120
BURSTS = 60
BURST = 750

Run = Callable[[int], float]


# In process.


def adapters() -> tuple[list[list[str]], list[Row]]:
    table, rows = [], []
    for what, runs in (("WSGI, on Flask", _wsgi()), ("ASGI, on Starlette", _asgi())):
        added = _added(runs)
        table.append([what, *(f"{added[name] * 1e6:.1f} µs" for name in ("tapes", "prometheus"))])
        ratio = added["tapes"] / added["prometheus"]
        measured = f"{added['tapes'] * 1e6:.1f} µs ({ratio:.2f} × a hand-written one)"
        rows.append(Row(f"middleware: {what}", measured, "≤ 4 µs", added["tapes"] <= 4e-6))
    return table, rows


def _added(runs: dict[str, Run]) -> dict[str, float]:
    differences: dict[str, list[float]] = {name: [] for name in runs if name != "bare"}
    number = max(20, int(0.006 / runs["bare"](100)))
    for turn in range(ROUNDS):
        gc.collect()
        gc.disable()
        try:
            names = list(differences)
            random.Random(turn).shuffle(names)
            for name in names:
                bare = runs["bare"](number)
                differences[name].append(runs[name](number) - bare)
        finally:
            gc.enable()
    return {name: statistics.median(values) for name, values in differences.items()}


def _wsgi() -> dict[str, Run]:
    import prometheus_client as prometheus
    from flask import Flask

    from tapes.contrib.wsgi import TapesMiddleware

    def shop() -> Any:
        app = Flask("shop")
        app.add_url_rule("/hello/<name>", "hello", lambda name: "ok")
        return app

    def written(inner: Any) -> Any:
        registry = prometheus.CollectorRegistry()
        requests = prometheus.Counter("r", "r", ["method", "status"], registry=registry)
        latency = prometheus.Histogram("l", "l", ["method"], registry=registry)

        def app(environ: Any, start_response: Any) -> Any:
            status = "500"

            def starting(line: str, headers: Any, exc_info: Any = None) -> Any:
                nonlocal status
                status = line[:3]
                return start_response(line, headers, exc_info)

            start = time.perf_counter()
            try:
                return inner(environ, starting)
            finally:
                method = environ["REQUEST_METHOD"]
                requests.labels(method, status).inc()
                latency.labels(method).observe(time.perf_counter() - start)

        return app

    apps = {name: shop() for name in ("bare", "tapes", "prometheus")}
    apps["tapes"].wsgi_app = TapesMiddleware(apps["tapes"].wsgi_app, tapes.Registry())
    apps["prometheus"].wsgi_app = written(apps["prometheus"].wsgi_app)
    environ = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/hello/bob", "QUERY_STRING": "",
        "SERVER_NAME": "shop", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "shop",
        "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr,
        "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
    }  # fmt: skip

    def runner(app: Any) -> Run:
        def run(number: int) -> float:
            start = time.perf_counter()
            for _ in range(number):
                body = app({**environ, "wsgi.input": io.BytesIO()}, lambda *_: None)
                for _piece in body:
                    pass
                body.close()
            return (time.perf_counter() - start) / number

        return run

    return {name: runner(app) for name, app in apps.items()}


def _asgi() -> dict[str, Run]:
    import prometheus_client as prometheus
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from tapes.contrib.asgi import TapesMiddleware

    async def hello(request: Any) -> Any:
        return PlainTextResponse("ok")

    def written(inner: Any) -> Any:
        registry = prometheus.CollectorRegistry()
        requests = prometheus.Counter("r", "r", ["method", "status"], registry=registry)
        latency = prometheus.Histogram("l", "l", ["method"], registry=registry)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            status = 500

            async def sending(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            start = time.perf_counter()
            try:
                await inner(scope, receive, sending)
            finally:
                requests.labels(scope["method"], status).inc()
                latency.labels(scope["method"]).observe(time.perf_counter() - start)

        return app

    def shop() -> Any:
        return Starlette(routes=[Route("/hello/{name}", hello)])

    apps = {"bare": shop(), "tapes": TapesMiddleware(shop(), tapes.Registry()), "prometheus": written(shop())}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "GET", "scheme": "http", "path": "/hello/bob", "raw_path": b"/hello/bob",
        "query_string": b"", "root_path": "", "headers": [(b"host", b"shop")],
        "client": ("127.0.0.1", 5000), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    loop = asyncio.new_event_loop()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    def runner(app: Any) -> Run:
        async def run(number: int) -> float:
            start = time.perf_counter()
            for _ in range(number):
                await app({**scope, "state": {}}, receive, send)
            return (time.perf_counter() - start) / number

        return lambda number: loop.run_until_complete(run(number))

    return {name: runner(app) for name, app in apps.items()}


# Under gunicorn.

APPLICATION = """
def bare(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "3")])
    return [b"ok\\n"]

def counting():
    import tapes
    tapes.join()
    requests, latency = tapes.counter("requests", method="GET", status="200"), tapes.histogram("latency")
    def app(environ, start_response):
        requests.increment()
        latency.update(0.0123)
        return bare(environ, start_response)
    return app

def measured():
    from tapes.contrib.wsgi import TapesMiddleware
    return TapesMiddleware(bare)
"""
CONTENDERS = {"counting()": "a counter and a histogram", "measured()": "the middleware"}


def under_gunicorn() -> tuple[list[list[str]], list[Row]]:
    if shutil.which("ab") is None:
        return [["ab is not installed", "–", "–"]], []
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as name, contextlib.ExitStack() as stack:
        directory = pathlib.Path(name)
        (directory / "shop.py").write_text(APPLICATION)
        servers = {app: stack.enter_context(_server(directory, app)) for app in ("bare", *CONTENDERS)}
        for server in [*servers.values()] * 2:
            _burst(server)
        bursts: dict[str, list[tuple[float, float]]] = {app: [] for app in servers}
        for turn in range(BURSTS):
            order = list(servers)
            random.Random(turn).shuffle(order)
            for app in order:
                bursts[app].append(_burst(servers[app]))
    table, rows = [], []
    bare_cpu = statistics.median(cpu for _, cpu in bursts["bare"])
    for app, what in CONTENDERS.items():
        pairs = list(zip(bursts["bare"], bursts[app]))
        throughput = statistics.median(measured[0] / bare[0] for bare, measured in pairs)
        added = statistics.median(measured[1] - bare[1] for bare, measured in pairs)
        table.append([what, f"{throughput:.3f} ×", f"{added * 1e6:+.1f} µs on {bare_cpu * 1e6:.0f}"])
        if app == "counting()":
            where = f"gunicorn with 4 workers, {what} per request"
            rows = [
                Row(f"{where}: throughput", f"{throughput:.3f} × none", "≥ 0.97 ×", throughput >= 0.97),
                Row(f"{where}: processor time", f"{added * 1e6:+.1f} µs", "≤ 6 µs", added <= 6e-6),
            ]
    return table, rows


class _Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, marker: str) -> None:
        self.process, self.port, self.marker = process, port, marker

    def cpu(self) -> float:
        """Return the seconds of processor time that its processes have used, its aggregator included."""
        pids = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.marker.encode() in (entry / "cmdline").read_bytes():
                        pids.append(entry.name)
        return sum(time.clock_gettime((~int(pid) << 3) | 2) for pid in set(pids))


@contextlib.contextmanager
def _server(directory: pathlib.Path, app: str) -> Iterator[_Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    private = directory / re.sub(r"\W", "", app)
    private.mkdir()
    command = [
        str(pathlib.Path(sys.executable).with_name("gunicorn")), "-w", "4", "-k", "gthread", "--threads", "4",
        "--keep-alive", "30", "-b", f"127.0.0.1:{port}", "--log-level", "error", f"shop:{app}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=directory, env={**os.environ, "TMPDIR": str(private), "XDG_RUNTIME_DIR": str(private)}
    )
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
                break
        yield _Server(process, port, str(private))
    finally:
        process.terminate()
        process.wait(20)


def _burst(server: _Server) -> tuple[float, float]:
    """Return requests per second, and the seconds of processor time of each."""
    before = server.cpu()
    url = f"http://127.0.0.1:{server.port}/"
    done = subprocess.run(
        ["ab", "-q", "-k", "-n", str(BURST), "-c", "16", url], capture_output=True, text=True, check=True
    )
    rate = float(re.search(r"Requests per second:\s+([\d.]+)", done.stdout)[1])  # type: ignore[index]
    return rate, (server.cpu() - before) / BURST
