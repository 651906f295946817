"""Request metrics and ``/metrics`` for any WSGI application.

    app.wsgi_app = TapesMiddleware(app.wsgi_app)

The application and its server see what they would see without it (PEP 3333): ``start_response`` and
``write`` pass through, ``close()`` is called once, exceptions are recorded and raised on. A request is timed
from the call to the last byte of the body, or to ``close()``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Callable, Union

from tapes.contrib._http import UNMATCHED, RequestMetrics, paths_of
from tapes.errors import InvalidArgument
from tapes.exposition.endpoint import Answer, answer, plain
from tapes.forks import check as check_fork
from tapes.naming import canonical_labels
from tapes.registry import Registry

__all__ = ["TapesMiddleware"]

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]
LabelsOf = Union[Mapping[str, Any], Callable[[Environ], Mapping[str, Any]], None]

_log = logging.getLogger("tapes.contrib.wsgi")


class TapesMiddleware:
    """Measures every request of a WSGI application, and answers ``/metrics`` for the whole service.

    Records the timer ``http.server.request.duration`` {method, route, status} and the gauge
    ``http.server.active_requests``. The route is the template (Flask's ``/users/<id>``), never the raw path.

    Args:
        app: The WSGI application.
        registry: Where to record; the default registry if ``None``.
        metrics_path: Where the metrics are answered, with and without a trailing slash; ``None`` for
            nowhere.
        exclude: Paths that are not measured.
        labels: Further labels: a dict, or a callable that takes the environ and returns one.
        body_sizes: Record the sizes of bodies too, in bytes.
        guard: A callable that takes the environ and says who may read the metrics; the others get 403.
        prefix: Put before the metrics' names, with a dot.
        route: A callable that takes the environ and returns the route's template, for applications whose
            framework is not known to this adapter.
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
        guard: Callable[[Environ], bool] | None = None,
        prefix: str = "",
        route: Callable[[Environ], str | None] | None = None,
    ) -> None:
        if metrics_path is not None and not metrics_path.startswith("/"):
            raise InvalidArgument(
                "metrics_path", got=metrics_path, expected="a path like '/metrics', or None"
            )
        self._app = app
        self._metrics = RequestMetrics(registry, prefix=prefix, body_sizes=body_sizes)
        self._metrics_paths = paths_of(metrics_path)
        self._excluded = paths_of(exclude)
        self._labels = labels if callable(labels) else dict(canonical_labels(labels, {}))
        self._guard = guard
        self._route = route

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, as PEP 3333 says."""
        check_fork()
        path = environ.get("PATH_INFO", "")
        if path in self._metrics_paths:
            return self._answer(environ, start_response)
        if path in self._excluded:
            return self._app(environ, start_response)
        request = _Request(self, environ, start_response)
        try:
            body = self._app(environ, request.start_response)
        except BaseException:
            request.finish("500")
            raise
        return _Body(body, request)

    def _answer(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        status, headers, body = self._metrics_answer(environ)
        headers["Content-Length"] = str(len(body))
        start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    def _metrics_answer(self, environ: Environ) -> Answer:
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            status, headers, body = plain(405, "The metrics can only be read.")
            return status, {**headers, "Allow": "GET, HEAD"}, body
        if not self._may_read(environ):
            return plain(403, "The metrics are not for everybody.")
        registry = self._metrics.registry
        if registry.connection is None and environ.get("wsgi.multiprocess"):
            return plain(
                503,
                "This process is one of several and is not connected to an aggregator, so it can't answer "
                "for the service: start gunicorn with -c python:tapes.contrib.gunicorn_conf (a hook of your "
                "own goes beside ours by with_tapes), import tapes.contrib.uwsgi, or start any other server "
                "by tapes run -- COMMAND.",
            )
        return answer(registry, environ.get("HTTP_ACCEPT", ""), environ.get("QUERY_STRING", ""))

    def _may_read(self, environ: Environ) -> bool:
        try:
            return self._guard is None or bool(self._guard(environ))
        except Exception:
            _log.exception("tapes: the guard of the metrics failed, so nobody may read them")
            return False


class _Request:
    """One request from its call to its end; finishing it twice is harmless."""

    __slots__ = ("_environ", "_middleware", "_route", "_sent", "_start", "_start_response", "_status")

    def __init__(self, middleware: TapesMiddleware, environ: Environ, start_response: StartResponse) -> None:
        self._middleware: TapesMiddleware | None = middleware
        self._environ = environ
        self._start_response = start_response
        self._route = UNMATCHED
        self._status = "500"
        self._sent = 0
        middleware._metrics.active.increment()
        self._start = middleware._metrics.registry.clock()

    def start_response(self, status: str, headers: Any, *exc_info: Any) -> Any:
        self._status = status[:3]
        # Flask drops its request before the application returns, so the route is looked up here.
        request = self._environ.get("werkzeug.request")
        rule = getattr(request, "url_rule", None)
        if rule is not None:
            self._route = rule.rule
        write = self._start_response(status, headers, *exc_info)
        if self._middleware is None or not self._middleware._metrics.body_sizes:
            return write

        def counting_write(data: bytes) -> Any:
            self.sent(data)
            return write(data)

        return counting_write

    def sent(self, data: bytes) -> None:
        """Note a piece of the body."""
        self._sent += len(data)

    def finish(self, status: str | None = None) -> None:
        """Record the request, with ``status`` or the one that it started its answer with."""
        middleware, self._middleware = self._middleware, None
        if middleware is None:
            return
        metrics = middleware._metrics
        now = metrics.registry.clock()
        metrics.active.decrement()
        method = self._environ.get("REQUEST_METHOD", "")
        try:
            route = (middleware._route and middleware._route(self._environ)) or self._route
            labels = middleware._labels
            more = self._more_labels(labels) if callable(labels) else labels
            metrics.record(method, route, status or self._status, now - self._start, now, more)
            if metrics.body_sizes:
                received = int(self._environ.get("CONTENT_LENGTH") or 0)
                metrics.record_sizes(method, route, received, self._sent)
        except Exception:
            _log.exception("tapes could not record a request")
        finally:
            metrics.request_ended()

    def _more_labels(self, labels: Callable[[Environ], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        try:
            return labels(self._environ)
        except Exception:
            _log.exception("tapes: the callable for further labels failed")
            return None


class _Body:
    """The application's body, passed on piece by piece."""

    __slots__ = ("_body", "_iterator", "_request")

    def __init__(self, body: Iterable[bytes], request: _Request) -> None:
        self._body = body
        self._request = request
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            data = next(self._iterator)
        except StopIteration:
            self._request.finish()
            raise
        except BaseException:
            self._request.finish("500")
            raise
        self._request.sent(data)
        return data

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._request.finish()

    def __del__(self) -> None:
        # A caller that drops the body without close() ends the request too: nothing stays active for ever.
        self._request.finish()
