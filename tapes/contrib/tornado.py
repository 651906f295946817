"""Request metrics and ``/metrics`` for Tornado applications.

    application = instrument(tornado.web.Application([...]))

No handler has to change. Tornado's server makes one connection object for each request, and tapes watches
that: from the request's headers to the last byte of the answer, for any kind of handler. The application sees
what it would see without it. `MetricsHandler` and `MeteredHandler` work without `instrument` too.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Unpack

import tapes
from tapes.contrib._http import UNMATCHED, Adapter, Exchange, may_read
from tapes.contrib._membership import Membership
from tapes.contrib.options import Guard, Options, complete, with_options
from tapes.errors import MissingExtra
from tapes.exposition.endpoint import Answer, refusal
from tapes.metrics import Meter, Timer
from tapes.registry import Registry, default_registry

try:
    from tornado.httputil import HTTPConnection, HTTPServerRequest
    from tornado.ioloop import IOLoop
    from tornado.web import Application, RequestHandler

    from tapes.contrib._tornado import Routes, Watch
except ModuleNotFoundError:
    raise MissingExtra("tapes.contrib.tornado", "tornado") from None

__all__ = ["UNMATCHED", "MeteredHandler", "MetricsHandler", "instrument"]

_log = logging.getLogger("tapes.contrib")
_services: dict[Registry, Membership] = {}


@with_options
def instrument(
    application: Application, registry: Registry | None = None, **options: Unpack[Options]
) -> Application:
    r"""Measure every request of an application, answer ``/metrics`` for the whole service, and return it.

    Records the timer ``http.server.request.duration`` {method, route, status} in seconds and the gauge
    ``http.server.active_requests``. The route is the pattern of the rule (``/users/(\d+)``), never the raw
    path; without one, the handler's name. The status 499 is a client that went away; 101 the handshake of a
    websocket, which is neither slow nor active while it is open; 500 also one that an exception broke off.

    Call it before the server forks or after; a worker process joins its service in the background. A second
    call changes nothing. Safe with event loops in many threads. ``TAPES_DISABLED=1`` turns it off.

    Args:
        application: The application; rules may be added later.
        registry: Where to record; the default registry if ``None``.
        options: ``metrics_path``, ``exclude``, ``labels``, ``body_sizes``, ``guard``, ``prefix``, ``route``;
            `tapes.contrib.options.Options` describes them.

    Raises:
        InvalidArgument, InvalidCall: If an option is out of its range, or does not exist.
    """
    options = complete(options)
    if not isinstance(getattr(application.find_handler, "__self__", None), _Instrument):
        measured = _Instrument(application, _Adapter(registry, application, options))
        application.find_handler = measured.find_handler  # type: ignore[method-assign]
    return application


class MetricsHandler(RequestHandler):
    """Answers the metrics of the whole service; without `instrument` as ``(r"/metrics", MetricsHandler)``.

    It reads them in a thread, as it may have to wait for the aggregator, up to a second.

    Args:
        registry: The registry to read; the default registry if ``None``.
        guard: As in `tapes.contrib.options.Options`.
    """

    def initialize(self, registry: Registry | None = None, guard: Guard = None) -> None:
        """Take the rule's arguments."""
        self._guard = guard
        self._registry = default_registry if registry is None else registry

    async def get(self) -> None:
        """Answer with the metrics, or refuse."""
        service, headers = _joined(self._registry), self.request.headers
        allowed = await may_read(self._guard, self.request, _log_error)
        answer = refusal("GET", headers.get("Authorization", ""), allowed)
        if answer is None:
            arguments = headers.get("Accept", ""), self.request.query
            answer = await IOLoop.current().run_in_executor(None, service.answer, *arguments)
        self._send(answer)

    async def head(self) -> None:
        """Answer without a body."""
        await self.get()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer other methods, which Tornado refuses with an exception of status 405."""
        answer = refusal(self.request.method or "") if status_code == 405 else None
        if answer is None:
            super().write_error(status_code, **kwargs)
        else:
            self._send(answer)

    def compute_etag(self) -> str | None:
        """Return ``None``: the metrics change all the time."""
        return None

    def check_xsrf_cookie(self) -> None:
        """Let a POST through, so that it gets status 405."""

    def _send(self, answer: Answer) -> None:
        status, headers, body = answer
        self.set_status(status)
        for name, value in headers.items():
            self.set_header(name, value)
        self.finish(body)


def _log_error(what: str, error: Exception) -> None:
    _log.error("%s", what, exc_info=error)


_Metered = tapes.metered_meta([
    ("latency", "http.endpoints.{}.latency", tapes.timer),
    ("error_rate", "http.endpoints.{}.error_rate", tapes.meter),
])  # fmt: skip


class MeteredHandler(RequestHandler, metaclass=_Metered):  # type: ignore[metaclass]
    """A handler; each of its subclasses has metrics of its own in the default registry.

    Subclasses can override every method, such as ``prepare``, without calling ``super()``. Works with
    `instrument` and with ``WebSocketHandler``, whose handshake is measured.

    Attributes:
        latency: Timer ``http.endpoints.CLASS.latency``: from the request's headers to the last byte of the
            answer, in seconds.
        error_rate: Meter ``http.endpoints.CLASS.error_rate``: answers with a status of 500 and above, and
            those that an exception broke off.
    """

    latency: ClassVar[Timer]
    error_rate: ClassVar[Meter]

    def __init__(self, application: Application, request: HTTPServerRequest, **kwargs: Any) -> None:
        try:
            if not _joined(default_registry).is_off and isinstance(request.connection, HTTPConnection):
                _MeteredRequest(request, self)
        except Exception:
            _log.exception("tapes could not measure a handler")
        super().__init__(application, request, **kwargs)


for _name in ("latency", "error_rate"):  # the base itself records nothing, so it is not shown
    default_registry.remove(f"http.endpoints.MeteredHandler.{_name}")


class _Adapter(Adapter):
    def has_own_route(self) -> bool:
        return Routes(self.application.outermost).has_rule(self.metrics_paths, MetricsHandler)


class _Instrument:
    """Replaces an application's ``find_handler``, which Tornado calls when the headers have arrived."""

    def __init__(self, application: Application, adapter: Adapter) -> None:
        self._application, self._adapter, self._routes = application, adapter, Routes(application)
        self._find_handler = application.find_handler
        _services[adapter.registry] = adapter.service

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        adapter, path = self._adapter, request.path
        adapter.look_for_own_route()
        service = _joined(adapter.registry)
        if adapter.leaves_out(path) or service.is_off:
            if path in adapter.metrics_paths:
                options = {"registry": adapter.registry, "guard": adapter.guard}
                return self._application.get_handler_delegate(request, MetricsHandler, options)
            return self._find_handler(request, **kwargs)
        try:
            # If the application is within another one that is measured, this only adds the route.
            outer = getattr(getattr(request.connection, "finish", None), "__self__", None)
            is_inner = isinstance(outer, _Request) and outer.active is adapter.active
            watch: Any = outer if is_inner else _Request(request, adapter)
        except Exception as error:
            adapter.log_once("tapes can't measure requests on such a connection", error)
            return self._find_handler(request, **kwargs)
        delegate = self._find_handler(request, **kwargs)  # if it fails the connection is closed
        try:
            watch.route = self._routes.of(request, delegate)
            watch.hook(delegate, "on_connection_close", *(["data_received"] if adapter.body_sizes else []))
        except Exception as error:
            adapter.log_once("tapes could not see where a request goes", error)
        return delegate


class _Request(Watch, Exchange):
    """A request that `instrument` measures."""

    def __init__(self, request: HTTPServerRequest, adapter: Adapter) -> None:
        self.adapter, self.source, self.method = adapter, request, request.method or ""
        self.active, self.route = adapter.active, UNMATCHED
        self.watch(request.connection, *(["write"] if adapter.body_sizes else []))
        self.active.increment()
        self.start = adapter.clock()

    end = Exchange.end


class _MeteredRequest(Watch):
    """A request that a `MeteredHandler` answers."""

    def __init__(self, request: HTTPServerRequest, handler: MeteredHandler) -> None:
        self._class: type[MeteredHandler] | None = type(handler)
        self._start = default_registry.clock() - max(0.0, request.request_time())  # by the wall clock
        self.watch(request.connection)
        self.hook(handler, "on_connection_close")  # a client may go away while it still sends the body

    def end(self, status: int) -> None:
        metered, self._class = self._class, None
        if metered is not None:
            metered.latency.update(default_registry.clock() - self._start)
            if status >= 500:
                metered.error_rate.mark()


def _joined(registry: Registry) -> Membership:
    """Return this process's membership in the service. Blocks once, to join it."""
    service = _services.get(registry) or _services.setdefault(registry, Membership(registry))
    if not service.mark[0] and service.begin():
        service.join()
    return service
