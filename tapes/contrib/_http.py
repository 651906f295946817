"""What the adapters of all frameworks share: how a request is named, and what is recorded of it.

The names are those of the OpenTelemetry HTTP semantic conventions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tapes.contrib._applications import Application
from tapes.contrib._membership import Membership
from tapes.contrib._setup import Setup
from tapes.contrib.options import Guard, Options, complete
from tapes.errors import InvalidArgument
from tapes.metrics import Timer
from tapes.metrics.folding import FULL
from tapes.metrics.gauge import DOWN_ONE
from tapes.naming import canonical_labels, label_text
from tapes.registry import Registry, default_registry

UNMATCHED = "<unmatched>"  # the route of requests that match no route
ROUTE = "tapes.route"  # key of the environ or the scope: an application can leave the route's template there

_METHODS = frozenset(
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"]
)
"""Methods that are recorded by name. All others are ``_OTHER``, as a client can invent any number of them."""

_DURATION = "http.server.request.duration"
_ACTIVE = "http.server.active_requests"
_REQUEST_SIZE = "http.server.request.body.size"
_RESPONSE_SIZE = "http.server.response.body.size"


class Adapter(Setup):
    """The request metrics of one application, for any protocol.

    A *source* is what the protocol knows of a request: the environ, the scope, the request object.
    """

    def __init__(self, registry: Registry | None, application: Any, options: Options) -> None:
        options = complete(options)
        registry = default_registry if registry is None else registry
        if not isinstance(registry, Registry):
            raise InvalidArgument("registry", got=registry, expected="a tapes.Registry, or None")
        for name, given in (("guard", options["guard"]), ("route", options["route"])):
            if not (given is None or callable(given)):
                raise InvalidArgument(name, got=given, expected="a callable of one argument, or None")
        before = f"{options['prefix']}." if options["prefix"] else ""
        # 1. First what every request touches, so that it lies together in memory.
        self.clock = registry.clock
        self.active = registry.gauge(before + _ACTIVE)
        self.timers: dict[Any, Timer] = {}
        self.body_sizes = options["body_sizes"]
        self.registry = registry
        # 2. Join the other processes of the service; then what the options ask for.
        self.service = Membership(registry)
        self._set_paths(options["metrics_path"], options["exclude"])
        self.guard, self._route_of, labels = options["guard"], options["route"], options["labels"]
        self.watch_setup(self.active, Application(application), expects_routes=self._route_of is None)
        self.is_left_out: Callable[[str], bool] | None = None  # set for Flask; takes an endpoint
        self.labels_of = labels if callable(labels) else None
        self._labels = {} if callable(labels) else dict(canonical_labels(labels, {}))
        self._labelled: dict[Any, Timer] = {}
        # 3. Name and describe the metrics.
        self.before, self._duration = before, before + _DURATION
        self._request_size, self._response_size = before + _REQUEST_SIZE, before + _RESPONSE_SIZE
        registry.describe(self._duration, "Duration of HTTP requests, to the last byte of the answer.")
        registry.describe(before + _ACTIVE, "HTTP requests that are being answered.")
        if self.body_sizes:
            registry.describe(self._request_size, "Size of HTTP request bodies.", unit="bytes")
            registry.describe(self._response_size, "Size of HTTP response bodies.", unit="bytes")

    def _set_paths(self, metrics_path: str | None, exclude: Iterable[str]) -> None:
        excluded = [exclude] if isinstance(exclude, str) else list(exclude)
        answered = [] if metrics_path is None else [metrics_path]
        self.metrics_paths = _paths("metrics_path", answered, "'/metrics', or None")
        exact = _paths("exclude", [p for p in excluded if not _is_below(p)], "'/health' or '/static/*'")
        self.own_paths = self.metrics_paths | exact
        self.excluded_below = tuple(path[:-1] for path in excluded if _is_below(path))

    def leaves_out(self, path: str) -> bool:
        """Return whether requests for ``path`` are not measured: it is excluded, or that of the metrics."""
        return path in self.own_paths or (bool(self.excluded_below) and path.startswith(self.excluded_below))

    def timer_of(self, exchange: Exchange, status: str | int) -> Timer | None:
        """Return the timer of a request that is not in `timers`; ``None`` if it is not to be measured."""
        if exchange.route is None:
            return None
        if exchange.route is not UNMATCHED:
            self.has_seen_routes = True
        # 1. Find the labels: the user's callables first.
        if self._route_of is not None:
            named = self._called(self._route_of, exchange.source, "the callable for routes")
            exchange.route = label_text(named or exchange.route)
        labels = getattr(exchange, "labels", None)
        if labels is None:
            labels = self.further_labels(exchange.source)
        text = status if isinstance(status, str) else str(int(status))  # it may be an HTTPStatus
        series = {**_method_and_route(exchange), "status": text}
        # 2. Find the timer; without the user's labels if those can't be used.
        try:
            more = {name: label_text(value) for name, value in labels.items()}
            key = (exchange.method, exchange.route, status, *more.items())
            timer = self._labelled.get(key)
            if timer is None:
                timer = self.registry.timer(self._duration, labels={**more, **series})
        except Exception as error:
            self.log_once("tapes records requests without further labels", error)
            return self.registry.timer(self._duration, labels=series)
        # 3. Keep it for the next request, unless clients can invent any number of such keys.
        if exchange.method in _METHODS and dict(timer.labels).get("overflow") is None:
            self._labelled[key] = timer
            if self._route_of is None and self.labels_of is None:
                self.timers[key[:3]] = timer
        return timer

    def further_labels(self, source: Any) -> Mapping[str, Any]:
        """Return the labels that the user adds to a request; none if the callable for them fails."""
        if self.labels_of is None:
            return self._labels
        return self._called(self.labels_of, source, "the callable for further labels") or {}

    def record_sizes(self, exchange: Exchange) -> None:
        if exchange.route is not None:
            labels = _method_and_route(exchange)
            self.registry.histogram(self._request_size, labels=labels).update(exchange.received)
            self.registry.histogram(self._response_size, labels=labels).update(max(0, exchange.sent))

    def _called(self, function: Callable[[Any], Any], source: Any, what: str) -> Any:
        try:
            return function(source)
        except Exception as error:
            self.log_once(f"tapes: {what} failed", error)
            return None

    def publish(self) -> None:
        """Publish what was recorded, where no thread does."""
        try:
            may_be_the_last = self.service.may_end_after_a_request
            session = self.registry.session.resolved()
            session.request_ended(may_be_the_last=may_be_the_last)
            if session.is_connected and not self.registry.session.is_connected:  # no aggregator answered
                self.service.join_again()
        except Exception as error:
            self.log_once("tapes could not publish at the end of a request", error)


async def may_read(
    guard: Guard, source: Any, log: Callable[[str, Exception], None], *, may_await: bool = True
) -> bool | None:
    """Return whether a guard, asynchronous or not, lets a client read the metrics; ``None`` without a guard.

    A guard that fails refuses the client, and ``log`` gets the reason. With ``may_await=False``, for WSGI,
    this never waits, and an asynchronous guard fails.
    """
    if guard is None:
        return None
    try:
        allowed = guard(source)
        if inspect.isawaitable(allowed):
            if not may_await:
                if inspect.iscoroutine(allowed):
                    allowed.close()
                raise TypeError(f"{allowed!r} has to be awaited, which WSGI can't do")
            allowed = await allowed
        return bool(allowed)
    except Exception as error:
        log("tapes: the guard of the metrics failed, so the client may not read them", error)
        return False


class Exchange:
    """One request from its call to its end, for any protocol. Ending it twice is harmless.

    Its maker sets the attributes, and moves `Adapter.active` up by appending ``UP_ONE`` to its buffer: every
    request would pay for a call of ``__init__()`` and of ``increment()``.
    """

    __slots__ = ("adapter", "labels", "method", "received", "route", "sent", "source", "start")
    adapter: Adapter | None  # where it is recorded; None once it has ended
    source: Any  # the request
    method: str  # as the client spelled it
    route: str | None  # the template; UNMATCHED if it isn't known yet, None if nothing is to be recorded
    labels: Mapping[str, Any]  # what Adapter.further_labels() returned, if that was called before the end
    received: int  # bytes of its body, if the adapter wants body_sizes
    sent: int  # bytes of the answer's body, likewise
    start: float  # when it began, on the registry's clock

    def end(self, status: str | int) -> None:
        """Record that it ended now, with ``status``. Failures in here are logged and never raised."""
        adapter = self.adapter
        if adapter is None:
            return
        self.adapter = None
        now = adapter.clock()
        # The buffers are filled here and not by the metrics' methods (this is Gauge.decrement(), and below
        # Timer._record()): after the application's code, most of what runs here has to be fetched from memory
        # again, so the number of functions is what counts.
        active = adapter.active
        steps = active._buffer
        steps.append(DOWN_ONE)
        if len(steps) >= FULL:
            active._fold(now)
        try:
            if self.route is UNMATCHED:
                self.route = self.late_route(adapter)
                if self.route is UNMATCHED and adapter.unrouted_left:
                    adapter.note_unrouted(status)
            timer = adapter.timers.get((self.method, self.route, status)) or adapter.timer_of(self, status)
            if timer is not None:
                if now >= timer._tick_end:
                    timer._fold(now)
                durations = timer._buffer
                durations.append(now - self.start)
                if len(durations) >= FULL:
                    timer._fold(now)
            if adapter.body_sizes:
                adapter.record_sizes(self)
        except Exception as error:
            adapter.log_once("tapes could not record a request", error)
        self.source = None  # it may refer to this exchange: no cycle is left
        if adapter.registry.session.flush_per_request:
            adapter.publish()

    def late_route(self, adapter: Any) -> str | None:
        """Return the route's template, now that the application has answered; see ``route``."""
        return UNMATCHED

    def __deepcopy__(self, memo: Any) -> Exchange:
        """Return itself: a deep copy of the environ or the scope keeps this exchange."""
        return self


def status_of(error: BaseException) -> str:
    """Return the status of a request that ended by ``error``.

    No client waits for those that end by other exceptions: a task was cancelled, a coroutine closed.
    """
    return "500" if isinstance(error, (Exception, KeyboardInterrupt, SystemExit)) else "499"


def is_complete(method: str, status: str | int, lengths: Iterable[str], sent: int) -> bool:
    """Return whether no byte of an answer is missing, though its end was not sent.

    ``lengths`` are the values of its ``Content-Length``; ``sent`` is the number of bytes of its body.
    """
    return method == "HEAD" or str(status) in ("204", "304") or str(sent) in lengths


def _method_and_route(exchange: Exchange) -> dict[str, str]:
    method = exchange.method if exchange.method in _METHODS else "_OTHER"
    return {"method": method, "route": label_text(exchange.route)}


def _is_below(path: Any) -> bool:
    return isinstance(path, str) and path.startswith("/") and path.endswith("/*")


def _paths(name: str, paths: Iterable[str], examples: str) -> frozenset[str]:
    """Return ``paths`` with and without a trailing slash."""
    for path in paths:
        if not isinstance(path, str) or not path.startswith("/"):
            raise InvalidArgument(name, got=path, expected=f"a path like {examples}")
    return frozenset(form for path in paths for form in (path.rstrip("/") or "/", path.rstrip("/") + "/"))
