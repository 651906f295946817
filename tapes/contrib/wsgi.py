"""Request metrics and ``/metrics`` for any WSGI application.

    app.wsgi_app = TapesMiddleware(app.wsgi_app)

The application and its server see what they would see without it (PEP 3333): ``start_response``, ``write``
and ``exc_info`` pass through, a body has a length if it had one, ``close()`` is called once, what
``wsgi.file_wrapper`` made reaches the server as it is, exceptions are recorded and raised on. A request is
timed from the call to the last byte of the body, or to ``close()``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any, cast

from tapes.contrib._http import (
    ROUTE,
    UNMATCHED,
    UP_ONE,
    Adapter,
    Exchange,
    Guard,
    LabelsOf,
    RouteOf,
    is_complete,
    status_of,
)
from tapes.exposition.endpoint import refusal
from tapes.registry import Registry

__all__ = ["ROUTE", "TapesMiddleware"]

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

_LEFT_OUT = object()
_MAX_DIGITS = 19
_modules: dict[str, Any] = sys.modules
_DEVELOPMENT = ("Werkzeug/", "WSGIServer/")


class TapesMiddleware:
    """Measures every request of a WSGI application, and answers ``/metrics`` for the whole service.

    Records the timer ``http.server.request.duration`` {method, route, status} and the gauge
    ``http.server.active_requests``. The route is the template (Flask's ``/users/<id>``), never the raw path;
    the status 499 is a client that went away. Safe from any thread and across forks; a process of several
    joins the others in the background when this is made. ``TAPES_DISABLED=1`` turns it off.

    Args:
        app: The WSGI application.
        registry: Where to record; the default registry if ``None``.
        metrics_path: Where the metrics are answered, with and without a trailing slash; ``None`` for
            nowhere.
        exclude: Paths that are not measured, with and without a trailing slash; ``"/static/*"`` is
            everything below.
        labels: Further labels: a dict, or a callable that takes the environ and returns one; it is called
            when the answer starts, in Flask's request context.
        body_sizes: Record the sizes of bodies too, in bytes.
        guard: A callable that takes the environ and says who may read the metrics; the others get 403.
            Without one, ``TAPES_METRICS_TOKEN`` is asked for, if it is set.
        prefix: Put before the metrics' names, with a dot.
        route: A callable that takes the environ and returns the route's template, for applications whose
            framework is not known to this adapter.

    Raises:
        InvalidArgument: If an option can't be used.
    """

    def __init__(
        self,
        app: App,
        registry: Registry | None = None,
        *,
        metrics_path: str | None = "/metrics",
        exclude: Iterable[str] = (),
        labels: LabelsOf = None,
        body_sizes: bool = False,
        guard: Guard = None,
        prefix: str = "",
        route: RouteOf = None,
    ) -> None:
        self._app = app
        self._adapter = Adapter(
            registry, metrics_path=metrics_path, exclude=exclude, labels=labels, body_sizes=body_sizes,
            guard=guard, prefix=prefix, route=route, application=app,
        )  # fmt: skip
        self._mark = self._adapter.service.mark
        self._own_paths = self._adapter.own_paths
        self._has_below = bool(self._adapter.excluded_below)
        mounts = getattr(app, "__dict__", {}).get("mounts")  # of werkzeug's DispatcherMiddleware
        self._mounts = mounts if isinstance(mounts, dict) else {}
        has_labels = self._adapter.labels_of is not None
        self._has_more = has_labels or self._adapter.body_sizes or bool(self._mounts)
        self._connect_to_flask()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, as PEP 3333 says."""
        if not self._mark[0] and not self._begin(environ):
            return self._app(environ, start_response)
        adapter = self._adapter
        path = environ.get("PATH_INFO", "")
        if path in self._own_paths or (self._has_below and adapter.leaves_out(path)):
            if path in adapter.metrics_paths:
                return self._answer(environ, start_response)
            return self._app(environ, start_response)
        exchange = _Exchange()
        if adapter.is_shared and adapter.is_within(environ, exchange):
            return self._app(environ, start_response)
        exchange.adapter = adapter
        exchange.source = environ
        exchange.method = environ.get("REQUEST_METHOD", "")
        exchange.route = UNMATCHED
        exchange.sent = -1  # nobody asked for a piece of it yet
        exchange._start_response = start_response
        exchange._status = "500"
        adapter.active._buffer.append(UP_ONE)
        exchange.start = adapter.clock()
        respond = exchange.start_response
        if self._has_more:
            exchange.prepare(self)
            respond = exchange.start_response_closely
        try:
            exchange.body = body = self._app(environ, respond)
        except BaseException as error:
            exchange.end(status_of(error))
            raise
        wrapper = environ.get("wsgi.file_wrapper")
        if wrapper is not None and _is_file(body, wrapper):
            exchange.watch(body)
            return body
        if hasattr(body, "__len__"):
            # granian sends a list at once; what is no body at all is the server's to refuse, or to send.
            if isinstance(body, (bytes, str)) or (
                isinstance(body, list) and environ.get("SERVER_SOFTWARE") == "Granian"
            ):
                exchange.end(exchange._status)
                return body
            exchange.__class__ = _SizedExchange
        elif body is None:
            exchange.end("500")
            return body
        return exchange

    def _begin(self, environ: Environ) -> bool:
        """Join, if this process has to; return whether requests are measured."""
        service = self._adapter.service
        self._adapter.look_for_own_route()
        if service.is_off:
            return environ.get("PATH_INFO", "") in self._adapter.metrics_paths
        is_development = str(environ.get("SERVER_SOFTWARE", "")).startswith(_DEVELOPMENT)
        if service.begin(bool(environ.get("wsgi.multiprocess")), is_development):
            service.join()
        return True

    def leave_out(self, is_left_out: Callable[[str], bool]) -> None:
        """Do not measure requests for the endpoints of Flask of which ``is_left_out`` is true."""
        self._adapter.is_left_out = is_left_out
        self._has_more = True

    def route_of(self, rule: Any, mounted: str) -> str | None:
        """Return the template of a rule of Flask; ``None`` if it is left out."""
        if self._adapter.is_left_out is not None and self._adapter.is_left_out(rule.endpoint):
            return None
        return (mounted if mounted in self._mounts else "") + str(rule.rule)

    def _connect_to_flask(self) -> None:
        """Have Flask call `_note_route`."""
        app, flask = self._adapter.application.flask, _modules.get("flask")
        if app is not None and flask is not None:
            flask.got_request_exception.connect(self._note_route, app)

    def _note_route(self, sender: Any, **_: Any) -> None:
        """Note the route of an exception that leaves Flask, as Flask drops its request before."""
        request: Any = sys.modules["flask"].request
        if request.url_rule is not None:
            request.environ[ROUTE] = self.route_of(request.url_rule, "") or _LEFT_OUT

    def _answer(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        method = environ.get("REQUEST_METHOD", "")
        allowed = self._adapter.is_allowed(environ)
        status, headers, body = refusal(
            method, environ.get("HTTP_AUTHORIZATION", ""), allowed
        ) or self._adapter.service.answer(environ.get("HTTP_ACCEPT", ""), environ.get("QUERY_STRING", ""))
        headers["Content-Length"] = str(len(body))
        start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
        return [] if method == "HEAD" else [body]


class _Exchange(Exchange):
    """One request, and the body of its answer."""

    __slots__ = (
        "_headers", "_is_routed", "_iterator", "_middleware", "_script", "_start_response", "_status", "body",
    )  # fmt: skip
    body: Iterable[bytes]
    _headers: Any
    _is_routed: bool
    _iterator: Iterator[bytes]
    _middleware: TapesMiddleware
    _script: str
    _start_response: StartResponse
    _status: str

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        """Pass on the beginning of the answer."""
        try:
            self._status = status[:3]
            self._headers = headers
            # Flask drops its request before the application returns, so the route is looked up here.
            request = self.source.get("werkzeug.request")
            if request is not None:
                self.route = request.url_rule.rule
            elif "flask" in _modules:
                self._ask_flask()
        except (AttributeError, TypeError):  # no rule matched; or what is no status, which the server refuses
            self._ask_flask()
        if exc_info is None:
            return self._start_response(status, headers)
        return self._start_response(status, headers, exc_info)

    def _ask_flask(self) -> Any:
        """Find the route by the request that Flask answers now, if that is this one; return that request.

        Where there is a copy of the environ, or another request was built from it, the environ has none.
        """
        flask = _modules.get("flask")
        if flask is None or not flask.has_request_context():
            return None
        request = flask.request
        if request.environ.get("wsgi.input") is not self.source.get("wsgi.input"):
            return None
        if request.url_rule is not None:
            self.route = request.url_rule.rule
        self._is_routed = True
        return request

    def prepare(self, middleware: TapesMiddleware) -> None:
        """Get ready for `start_response_closely`."""
        self.received = 0
        self._middleware = middleware
        self._script = self.source.get("SCRIPT_NAME", "")
        length = self.source.get("CONTENT_LENGTH") or ""
        if length.isdecimal() and len(length) < _MAX_DIGITS:  # a client may claim anything
            self.received = int(length)

    def start_response_closely(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        """Pass it on, and see what options ask for."""
        write = self.start_response(status, headers, exc_info)
        middleware = self._middleware
        try:
            if not hasattr(self, "labels"):
                self.labels = middleware._adapter.further_labels(self.source)
            request = self.source.get("werkzeug.request")
            if getattr(request, "url_rule", None) is None:
                request = self._ask_flask()
            if request is not None and request.url_rule is not None:
                mounted = request.environ.get("SCRIPT_NAME", "")[len(self._script) :]
                self.route = middleware.route_of(request.url_rule, mounted)
        except Exception as error:
            middleware._adapter.complain("tapes could not see how an answer starts", error)

        def counting(data: bytes) -> Any:
            self.sent = max(0, self.sent) + len(data)
            return write(data)

        return counting

    def __iter__(self) -> Iterator[bytes]:
        # A generator is resumed in half the time that a call of __next__() takes.
        if self.sent < 0:
            self.sent = 0
        try:
            for data in self.body:
                try:  # noqa: SIM105 - suppress() is a call
                    self.sent += len(data)
                except TypeError:  # what is no bytes is for the server to find
                    pass
                yield data
        except GeneratorExit:  # the server has stopped asking
            self.end(self._status_at_close())
            raise
        except BaseException as error:
            self.end(status_of(error))
            raise
        self.end(self._status)

    def __next__(self) -> bytes:
        """For callers that take a body for an iterator; PEP 3333 says that it is an iterable."""
        if not hasattr(self, "_iterator"):
            self._iterator = iter(self)
        return next(self._iterator)

    def close(self) -> None:
        """Close the body, once for each time that the server does."""
        try:
            close = getattr(self.body, "close", None)
            if close is not None:
                close()
        finally:
            if self.adapter is not None:
                self.end(self._status_at_close())

    def watch(self, body: Any) -> None:
        """End when a file that the server gets as it is is closed."""
        close = getattr(body, "close", None)

        def closing() -> None:
            body.close = close  # as it was: no cycle is left
            try:
                if close is not None:
                    close()
            finally:
                self.end(self._status)

        try:
            body.close = closing
        except AttributeError:  # uWSGI hands on the file itself: what it sends can't be timed
            self.end(self._status)

    def _status_at_close(self) -> str:
        """Return 499 if the server stopped asking in the middle: the client went away."""
        if not hasattr(self, "_headers"):
            return "500"  # which the server makes of an answer that never started
        if self.sent < 0:
            return self._status
        try:
            lengths = [value for name, value in self._headers if name.lower() == "content-length"]
        except Exception:  # no headers, which the server has refused
            lengths = []
        return self._status if is_complete(self.method, self._status, lengths, self.sent) else "499"

    def late_route(self, adapter: Adapter) -> str | None:
        environ = self.source
        route = environ.get(ROUTE)
        if route:
            return None if route is _LEFT_OUT else str(route)
        application = adapter.application
        if not application.may_have_routes or hasattr(self, "_is_routed"):  # Flask has found no route
            return UNMATCHED
        # This costs what the framework takes to find a route.
        rule = application.rule_of(environ)
        if rule is None:
            return application.django_route_of(_path_info(environ)) or UNMATCHED
        is_left_out = adapter.is_left_out is not None and adapter.is_left_out(rule.endpoint)
        return None if is_left_out else str(rule.rule)


class _SizedExchange(_Exchange):
    """One whose body has a length; of the same layout, so an exchange can become one when that is known."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(cast("list[bytes]", self.body))


def _path_info(environ: Environ) -> str:
    return str(environ.get("PATH_INFO") or "/").encode("latin-1").decode("utf-8", "replace")


def _is_file(body: Any, wrapper: Any) -> bool:
    """Return whether ``wsgi.file_wrapper`` made a body; uWSGI's is a function that returns the file."""
    return isinstance(body, wrapper) if isinstance(wrapper, type) else hasattr(body, "read")
