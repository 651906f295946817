"""A plugin of pytest for the suites of other projects: puts the adapter around every application.

It also writes the outcomes to a file. It is copied into the environment of `suites` under a name of its own.
These variables configure it:

* ``TAPES_SUITE_OUTCOMES``: The file for the outcomes of the tests, as JSON.
* ``TAPES_SUITE_WRAPS``: The project whose applications are wrapped; none if it is absent.
* ``TAPES_SUITE_CHILDREN``: A directory in which processes that the tests start leave their counts.
* ``TAPES_SUITE_CHILD``: Set by this plugin: processes that the tests start wrap too.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import json
import logging
import os
import pathlib
import pkgutil
import weakref
from typing import Any

DURATION = "http.server.request.duration"
ACTIVE = "http.server.active_requests"

registries: list[Any] = []
outcomes: dict[str, str] = {}


def fresh() -> Any:
    """Return a registry for one application, whose requests are counted at the end."""
    import tapes

    registries.append(tapes.Registry())
    return registries[-1]


def measured() -> int:
    """Return the number of measured requests."""
    return sum(series.count for registry in registries for series in registry.snapshot().series(DURATION))


def active() -> float:
    """Return the number of requests that are still active."""
    return sum(series.value for registry in registries for series in registry.snapshot().series(ACTIVE))


class _Weakly:
    """Flask's own ``wsgi_app`` without a reference cycle: a test needs applications to be freed at once."""

    def __init__(self, app: Any) -> None:
        self._of = weakref.ref(app)

    @property
    def __self__(self) -> Any:
        return self._of()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        app = self._of()
        return type(app).wsgi_app(app, environ, start_response)


def wrap_flask() -> None:
    """Wrap ``wsgi_app`` of every application as soon as it is made."""
    import flask

    from tapes.contrib.flask import TapesMiddleware

    make = flask.Flask.__init__

    @functools.wraps(make)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self.wsgi_app = TapesMiddleware(_Weakly(self), fresh(), metrics_path=None)

    flask.Flask.__init__ = __init__


def wrap_werkzeug() -> None:
    """Wrap what the test client and ``run_wsgi_app`` call, and what the development server serves."""
    import werkzeug.serving
    import werkzeug.test

    from tapes.contrib.wsgi import TapesMiddleware

    run, make = werkzeug.test.run_wsgi_app, werkzeug.serving.BaseWSGIServer.__init__

    @functools.wraps(run)
    def run_wsgi_app(app: Any, environ: Any, buffered: bool = False) -> Any:
        return run(TapesMiddleware(app, fresh(), metrics_path=None), environ, buffered)

    @functools.wraps(make)
    def __init__(self: Any, host: Any, port: Any, app: Any, *arguments: Any, **options: Any) -> None:
        make(self, host, port, TapesMiddleware(app, fresh(), metrics_path=None), *arguments, **options)

    werkzeug.test.run_wsgi_app = run_wsgi_app
    werkzeug.serving.BaseWSGIServer.__init__ = __init__


def wrap_starlette() -> None:
    """Wrap what the test client calls, and every application of Starlette's classes that is called directly.

    Applications within a wrapped one are not wrapped, so a request is counted once.
    """
    import starlette
    import starlette.testclient

    from tapes.contrib.asgi import TapesMiddleware

    is_within = contextvars.ContextVar("is_within", default=False)

    def outermost(call: Any, middleware: Any = None) -> Any:
        async def calling(scope: Any, receive: Any, send: Any) -> None:
            if is_within.get():
                await call(scope, receive, send)
                return
            token = is_within.set(True)
            try:
                await (middleware or TapesMiddleware(call, fresh(), metrics_path=None))(scope, receive, send)
            finally:
                is_within.reset(token)

        return calling

    def is_asgi(kind: Any) -> bool:
        call = vars(kind).get("__call__") if inspect.isclass(kind) else None
        return call is not None and [*inspect.signature(call).parameters][1:] == ["scope", "receive", "send"]

    def wrap_class(kind: Any) -> None:
        call = kind.__call__

        @functools.wraps(call)
        async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> None:
            await outermost(functools.partial(call, self))(scope, receive, send)

        kind.__call__ = __call__

    for module in pkgutil.walk_packages(starlette.__path__, "starlette."):
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError:  # its extra is not installed
            continue
        for kind in list(members.values()):
            if is_asgi(kind) and kind.__module__ == module.name:
                wrap_class(kind)

    client = starlette.testclient.TestClient
    make = client.__init__

    @functools.wraps(make)
    def __init__(self: Any, app: Any, *arguments: Any, **options: Any) -> None:
        make(self, app, *arguments, **options)
        middleware = TapesMiddleware(self.app, fresh(), metrics_path=None)
        self.app = self._transport.app = outermost(self.app, middleware)

    client.__init__ = __init__


def wrap_tornado() -> None:
    """Instrument every application as soon as it is made."""
    import tornado.web

    from tapes.contrib.tornado import instrument

    make = tornado.web.Application.__init__

    @functools.wraps(make)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        instrument(self, fresh(), metrics_path=None)

    tornado.web.Application.__init__ = __init__


def wrap() -> None:
    """Wrap the applications of the project that is tested."""
    globals()["wrap_" + os.environ["TAPES_SUITE_WRAPS"]]()


def wrap_in_child() -> None:
    """Wrap in a process that a test has started. It may be killed, so it writes its count at each request."""
    from tapes.contrib._http import Exchange

    end = Exchange.end

    def ending(self: Any, status: Any) -> None:
        end(self, status)
        with pathlib.Path(os.environ["TAPES_SUITE_CHILDREN"], str(os.getpid())).open("a") as file:
            file.write(f"{measured()}\n")

    Exchange.end = ending
    wrap()


def pytest_configure() -> None:
    """Wrap before a test is imported."""
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)  # as Tornado's own runner does
    if "TAPES_SUITE_WRAPS" in os.environ:
        wrap()
        if os.environ["TAPES_SUITE_WRAPS"] == "werkzeug":  # whose tests start the development server
            os.environ["TAPES_SUITE_CHILD"] = "1"


def pytest_collectreport(report: Any) -> None:
    """Record a file that can't be imported as failed."""
    if report.failed:
        outcomes[report.nodeid] = "failed"


def pytest_collection_modifyitems(items: Any) -> None:
    """Record the collected tests."""
    outcomes.update((item.nodeid, "collected") for item in items)


def pytest_runtest_logreport(report: Any) -> None:
    """Record the outcome of a test: it failed if any part of it failed."""
    outcome = "passed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
    if (report.when == "call" or outcome != "passed") and outcomes.get(report.nodeid) != "failed":
        outcomes[report.nodeid] = outcome


def pytest_sessionfinish() -> None:
    """Write the outcomes and the counts."""
    counts = pathlib.Path(os.environ["TAPES_SUITE_CHILDREN"]).iterdir()
    found = {
        "outcomes": outcomes,
        "measured": measured() + sum(max(map(int, path.read_text().split()), default=0) for path in counts),
        "active": active(),
    }
    pathlib.Path(os.environ["TAPES_SUITE_OUTCOMES"]).write_text(json.dumps(found))
