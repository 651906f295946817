"""Request metrics and ``/metrics`` for any WSGI application.

    app.wsgi_app = TapesMiddleware(app.wsgi_app)

The application and its server see what they would see without it (PEP 3333): ``start_response``, ``write``
and ``exc_info`` pass through, a body has a length if it had one, ``close()`` is called once, a file from
``wsgi.file_wrapper`` reaches the server unchanged, exceptions are recorded and raised again. A request is
timed from the call to the last byte of the body, or to ``close()``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from http import HTTPStatus
from typing import Any, Unpack, cast

from tapes.contrib._http import ROUTE, UNMATCHED, Adapter, Exchange, is_complete, may_read, status_of
from tapes.contrib.options import Options, with_options
from tapes.exposition.endpoint import refusal
from tapes.metrics.gauge import UP_ONE
from tapes.registry import Registry

__all__ = ["ROUTE", "TapesMiddleware"]

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

_LEFT_OUT = object()  # the route of a request that is not measured
_MAX_DIGITS = 19  # maximum number of digits of a Content-Length
_modules: dict[str, Any] = sys.modules
_RAW = (bytes, str)  # an application must not return these: whether to send them is the server's decision
_SERVER = "SERVER_SOFTWARE"
_DEVELOPMENT = ("Werkzeug/", "WSGIServer/")


class TapesMiddleware:
    """Measures every request of a WSGI application, and answers ``/metrics`` for the whole service.

    Records the timer ``http.server.request.duration`` {method, route, status} and the gauge
    ``http.server.active_requests``. The route is the template (Flask's ``/users/<id>``), never the raw path;
    the status 499 is a client that went away. Safe from any thread and across forks; a worker process joins
    its service in the background when this is made. ``TAPES_DISABLED=1`` turns it off.

    Args:
        app: The WSGI application.
        registry: Where to record; the default registry if ``None``.
        options: ``metrics_path``, ``exclude``, ``labels``, ``body_sizes``, ``guard``, ``prefix``, ``route``;
            `tapes.contrib.options.Options` describes them.

    Raises:
        InvalidArgument, InvalidCall: If an option is out of its range, or does not exist.
    """

    @with_options
    def __init__(self, app: App, registry: Registry | None = None, **options: Unpack[Options]) -> None:
        self._app = app
        self._adapter = Adapter(registry, app, options)
        self._mark = self._adapter.service.mark
        self._own_paths = self._adapter.own_paths
        self._has_below = bool(self._adapter.excluded_below)
        mounts = getattr(app, "__dict__", {}).get("mounts")  # of werkzeug's DispatcherMiddleware
        self._mounts = mounts if isinstance(mounts, dict) else {}
        has_labels = self._adapter.labels_of is not None
        self._has_more = has_labels or self._adapter.body_sizes or bool(self._mounts)
        app, flask = self._adapter.application.flask, _modules.get("flask")
        if app is not None and flask is not None:
            flask.got_request_exception.connect(self._note_route, app)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, as PEP 3333 defines it."""
        # 1. Requests that are not measured.
        if not self._mark[0] and not self._begin(environ):
            return self._app(environ, start_response)
        adapter, path = self._adapter, environ.get("PATH_INFO", "")
        if path in self._own_paths or (self._has_below and adapter.leaves_out(path)):
            if path in adapter.metrics_paths:
                return self._answer(environ, start_response)
            return self._app(environ, start_response)
        exchange = _Exchange()
        if adapter.is_shared and adapter.is_within(environ, exchange):
            return self._app(environ, start_response)
        # 2. Begin to measure. An __init__() would be one more call in each request.
        exchange.adapter, exchange.source = adapter, environ
        exchange.method = environ.get("REQUEST_METHOD", "")
        exchange.route, exchange._status = UNMATCHED, "500"
        exchange.sent = -1  # the server has not asked for a piece of the body yet
        exchange._start_response = start_response
        adapter.active._buffer.append(UP_ONE)
        exchange.start = adapter.clock()
        respond = exchange.start_response
        if self._has_more:
            exchange.prepare(self)
            respond = exchange.start_response_with_options
        # 3. Call the application.
        try:
            exchange.body = body = self._app(environ, respond)
        except BaseException as error:
            exchange.end(status_of(error))
            raise
        # 4. Return a body of the same kind. Granian gets its list, which it sends at once.
        wrapper = environ.get("wsgi.file_wrapper")
        if wrapper is not None and _is_file(body, wrapper):
            exchange.end_with(body)
            return body
        if hasattr(body, "__len__"):
            if isinstance(body, _RAW) or (isinstance(body, list) and environ.get(_SERVER) == "Granian"):
                exchange.end(exchange._status)
                return body
            exchange.__class__ = _SizedExchange
        elif body is None:
            exchange.end("500")
            return body
        return exchange

    def _begin(self, environ: Environ) -> bool:
        """Join the service, if this process has to; return whether requests are measured."""
        service = self._adapter.service
        self._adapter.look_for_own_route()
        if service.is_off:
            return environ.get("PATH_INFO", "") in self._adapter.metrics_paths
        is_development = str(environ.get(_SERVER, "")).startswith(_DEVELOPMENT)
        if service.begin(bool(environ.get("wsgi.multiprocess")), is_development):
            service.join()
        return True

    def leave_out(self, is_left_out: Callable[[str], bool]) -> None:
        """Do not measure requests for the endpoints of Flask for which ``is_left_out`` is true."""
        self._adapter.is_left_out = is_left_out
        self._has_more = True

    def route_of(self, rule: Any, mounted: str) -> str | None:
        """Return the template of a rule of Flask; ``None`` if it is left out."""
        if self._adapter.is_left_out is not None and self._adapter.is_left_out(rule.endpoint):
            return None
        return (mounted if mounted in self._mounts else "") + str(rule.rule)

    def _note_route(self, sender: Any, **_: Any) -> None:
        """Keep the route of an exception that leaves Flask, which drops its request before that."""
        request: Any = sys.modules["flask"].request
        if request.url_rule is not None:
            request.environ[ROUTE] = self.route_of(request.url_rule, "") or _LEFT_OUT

    def _answer(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        method = environ.get("REQUEST_METHOD", "")
        allowed = _run(may_read(self._adapter.guard, environ, self._adapter.log_once, may_await=False))
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
        try:
            self._status = status[:3]
            self._headers = headers
            # Flask drops its request before the application returns, so the route is looked up here.
            request = self.source.get("werkzeug.request")
            if request is not None:
                self.route = request.url_rule.rule
            elif "flask" in _modules:
                self._ask_flask()
        except (AttributeError, TypeError):  # no rule matched; or an invalid status, which the server refuses
            self._ask_flask()
        if exc_info is None:
            return self._start_response(status, headers)
        return self._start_response(status, headers, exc_info)

    def _ask_flask(self) -> Any:
        """Take the route from Flask's current request, and return that; ``None`` if it is another request.

        The environ has no such request if Flask got a copy of it, or if another request was built from it.
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
        self.received = 0
        self._middleware = middleware
        self._script = self.source.get("SCRIPT_NAME", "")
        length = self.source.get("CONTENT_LENGTH") or ""
        if length.isdecimal() and len(length) < _MAX_DIGITS:  # clients can send anything
            self.received = int(length)

    def start_response_with_options(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        """Pass on the beginning of the answer, and look up what the options need."""
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
            middleware._adapter.log_once("tapes could not see how an answer starts", error)

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
                except TypeError:  # not bytes: the server refuses it
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
        """Return the next piece, for callers that expect an iterator; PEP 3333 asks for an iterable only."""
        if not hasattr(self, "_iterator"):
            self._iterator = iter(self)
        return next(self._iterator)

    def close(self) -> None:
        try:
            close = getattr(self.body, "close", None)
            if close is not None:
                close()
        finally:
            if self.adapter is not None:
                self.end(self._status_at_close())

    def end_with(self, body: Any) -> None:
        """End when the server closes ``body``, a file that it gets unchanged."""
        close = getattr(body, "close", None)

        def closing() -> None:
            body.close = close  # the original, so that no cycle is left
            try:
                if close is not None:
                    close()
            finally:
                self.end(self._status)

        try:
            body.close = closing
        except AttributeError:  # uWSGI returns the file itself, so the sending can't be timed
            self.end(self._status)

    def _status_at_close(self) -> str:
        """Return 499 if the server stopped in the middle of the body: the client went away."""
        if not hasattr(self, "_headers"):
            return "500"  # what the server sends if the answer never started
        if self.sent < 0:
            return self._status
        try:
            lengths = [value for name, value in self._headers if name.lower() == "content-length"]
        except Exception:  # invalid headers, which the server has refused
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
        # Ask the framework, which finds the route a second time.
        rule = application.rule_of(environ)
        if rule is None:
            path = str(environ.get("PATH_INFO") or "/").encode("latin-1").decode("utf-8", "replace")
            return application.django_route_of(path) or UNMATCHED
        is_left_out = adapter.is_left_out is not None and adapter.is_left_out(rule.endpoint)
        return None if is_left_out else str(rule.rule)


class _SizedExchange(_Exchange):
    """An exchange whose body has a length. Its layout is the same, so that ``__class__`` can be set to it."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(cast("list[bytes]", self.body))


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError(f"{coroutine!r} waits")


def _is_file(body: Any, wrapper: Any) -> bool:
    """Return whether ``wsgi.file_wrapper`` made a body; uWSGI's is a function that returns the file."""
    return isinstance(body, wrapper) if isinstance(wrapper, type) else hasattr(body, "read")
