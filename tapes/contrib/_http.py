"""What the adapters of all frameworks share: their options, how a request is named, what is recorded of it.

The names are those of the OpenTelemetry HTTP semantic conventions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tapes.contrib._applications import Application
from tapes.contrib._membership import Membership
from tapes.contrib._setup import Setup
from tapes.errors import InvalidArgument
from tapes.metrics import Timer
from tapes.metrics.base import FULL
from tapes.metrics.gauge import DOWN_ONE, UP_ONE
from tapes.naming import canonical_labels, label_text
from tapes.registry import Registry, default_registry

__all__ = [
    "METHODS",
    "ROUTE",
    "UNMATCHED",
    "UP_ONE",
    "Adapter",
    "Exchange",
    "Guard",
    "LabelsOf",
    "RouteOf",
    "allows",
    "is_complete",
    "status_of",
]

LabelsOf = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None
Guard = Callable[[Any], Any] | None
RouteOf = Callable[[Any], str | None] | None

UNMATCHED = "<unmatched>"
"""The route of what matches none."""

ROUTE = "tapes.route"
"""Where in the environ or the scope an application of any framework may leave the route's template."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
"""Methods by their own name; all others are ``_OTHER``, as a client can invent any number of them."""

_DURATION = "http.server.request.duration"
_ACTIVE = "http.server.active_requests"
_REQUEST_SIZE = "http.server.request.body.size"
_RESPONSE_SIZE = "http.server.response.body.size"


class Adapter(Setup):
    """An application's request metrics, whatever its protocol: options, recording, and the answer to readers.

    A *source* is what the protocol knows of a request: the environ, the scope, the request.

    Args:
        registry: Where to record; the default registry if ``None``.
        metrics_path: Where the metrics are answered, with and without a trailing slash; ``None`` for
            nowhere.
        exclude: Paths that are not measured, with and without a trailing slash; ``"/static/*"`` is everything
            below.
        labels: Further labels: a dict, or a callable that takes the source and returns one.
        body_sizes: Record the sizes of bodies too, in bytes.
        guard: A callable that takes the source and says who may read the metrics; the others get 403.
        prefix: Put before the metrics' names, with a dot.
        route: A callable that takes the source and returns the route's template, ``None`` if it knows none.
        application: What is measured, if it is a WSGI or ASGI application.

    Raises:
        InvalidArgument: If one of them can't be used.
    """

    def __init__(
        self,
        registry: Registry | None = None,
        *,
        metrics_path: str | None = "/metrics",
        exclude: Iterable[str] = (),
        labels: LabelsOf = None,
        body_sizes: bool = False,
        guard: Guard = None,
        prefix: str = "",
        route: RouteOf = None,
        application: Any = None,
    ) -> None:
        registry = default_registry if registry is None else registry
        if not isinstance(registry, Registry):
            raise InvalidArgument("registry", got=registry, expected="a tapes.Registry, or None")
        before = f"{prefix}." if prefix else ""
        # First what every request touches, so that it lies together in memory.
        self.clock = registry.clock
        self.active = registry.gauge(before + _ACTIVE)
        self.timers: dict[Any, Timer] = {}
        self.body_sizes = body_sizes
        self.registry = registry
        for name, given in (("guard", guard), ("route", route)):
            if not (given is None or callable(given)):
                raise InvalidArgument(name, got=given, expected="a callable of one argument, or None")
        self.service = Membership(self.registry)
        self.metrics_paths = _paths("metrics_path", [] if metrics_path is None else [metrics_path])
        excluded = [exclude] if isinstance(exclude, str) else list(exclude)
        left_out = _paths("exclude", [path for path in excluded if not _is_below(path)])
        self.own_paths = self.metrics_paths | left_out
        self.excluded_below = tuple(path[:-1] for path in excluded if _is_below(path))
        self.guard = guard
        self._route_of = route
        self.watch_setup(self.active, Application(application), expects_routes=route is None)
        self.is_left_out: Callable[[str], bool] | None = None  # of an endpoint of Flask
        self.labels_of = labels if callable(labels) else None
        self._labels = {} if callable(labels) else dict(canonical_labels(labels, {}))
        self._labelled: dict[Any, Timer] = {}
        self._duration = before + _DURATION
        self._request_size = before + _REQUEST_SIZE
        self._response_size = before + _RESPONSE_SIZE
        describe = self.registry.describe
        describe(self._duration, "Duration of HTTP requests, to the last byte of the answer.")
        describe(before + _ACTIVE, "HTTP requests that are being answered.")
        if body_sizes:
            describe(self._request_size, "Size of HTTP request bodies.", unit="bytes")
            describe(self._response_size, "Size of HTTP response bodies.", unit="bytes")

    def leaves_out(self, path: str) -> bool:
        """Return whether a request for ``path`` is not measured: it is excluded, or for the metrics."""
        return path in self.own_paths or (bool(self.excluded_below) and path.startswith(self.excluded_below))

    def timer_of(self, exchange: Exchange, status: str | int) -> Timer | None:
        """Return the timer of a request that is not in `timers`; ``None`` if it is not to be measured."""
        if exchange.route is None:
            return None
        if exchange.route is not UNMATCHED:
            self.has_seen_routes = True
        if self._route_of is not None:
            named = self._called(self._route_of, exchange.source, "the callable for routes")
            exchange.route = label_text(named or exchange.route)
        labels = getattr(exchange, "labels", None)
        if labels is None:
            labels = self.further_labels(exchange.source)
        series = {
            "method": _known(exchange.method),
            "route": label_text(exchange.route),
            "status": status if isinstance(status, str) else str(int(status)),  # of an HTTPStatus too
        }
        try:
            more = {name: label_text(value) for name, value in labels.items()}
            key = (exchange.method, exchange.route, status, *more.items())
            timer = self._labelled.get(key)
            if timer is None:
                timer = self.registry.timer(self._duration, labels={**more, **series})
        except Exception as error:
            self.complain("tapes records requests without further labels", error)
            return self.registry.timer(self._duration, labels=series)
        if exchange.method in METHODS and dict(timer.labels).get("overflow") is None:
            self._labelled[key] = timer
            if self._route_of is None and self.labels_of is None:
                self.timers[key[:3]] = timer
        return timer

    def further_labels(self, source: Any) -> Mapping[str, Any]:
        """Return what the user's callable for labels says of a request; nothing if it fails."""
        if self.labels_of is None:
            return self._labels
        return self._called(self.labels_of, source, "the callable for further labels") or {}

    def record_sizes(self, exchange: Exchange) -> None:
        """Record the sizes of both bodies, in bytes."""
        if exchange.route is not None:
            labels = {"method": _known(exchange.method), "route": label_text(exchange.route)}
            self.registry.histogram(self._request_size, labels=labels).update(exchange.received)
            self.registry.histogram(self._response_size, labels=labels).update(max(0, exchange.sent))

    def _called(self, function: Callable[[Any], Any], source: Any, what: str) -> Any:
        try:
            return function(source)
        except Exception as error:
            self.complain(f"tapes: {what} failed", error)
            return None

    def tell(self) -> None:
        """Publish what was recorded, as no thread does."""
        try:
            connection = self.registry.connection
            if connection is not None:
                connection.request_ended(may_be_the_last=self.service.may_end_after_a_request)
                if self.registry.connection is None:  # the aggregator did not answer
                    self.service.join_again()
        except Exception as error:
            self.complain("tapes could not publish at the end of a request", error)

    def is_allowed(self, source: Any) -> bool | None:
        """Return what the guard says; ``None`` if there is none. A guard that fails lets nobody in."""
        if self.guard is None:
            return None
        allowed = self._called(self.guard, source, _GUARD)
        if not inspect.isawaitable(allowed):
            return bool(allowed)
        self.complain(
            f"tapes: {_GUARD} has to be awaited, which can't be done here", TypeError(repr(allowed))
        )
        if inspect.iscoroutine(allowed):
            allowed.close()
        return False

    async def is_allowed_later(self, source: Any) -> bool | None:
        """Return what a guard says that may be asynchronous; as `is_allowed`."""
        return await allows(self.guard, source, self.complain)


async def allows(guard: Guard, source: Any, complain: Callable[[str, Exception], None]) -> bool | None:
    """Return what a guard says, asynchronous or not; as `Adapter.is_allowed`."""
    if guard is None:
        return None
    try:
        allowed = guard(source)
        return bool(await allowed if inspect.isawaitable(allowed) else allowed)
    except Exception as error:
        complain(f"tapes: {_GUARD} failed", error)
        return False


_GUARD = "the guard of the metrics, so nobody may read them,"


class Exchange:
    """One request from its call to its end, whatever its protocol; ending it twice is harmless.

    Who makes one sets its attributes, and moves `Adapter.active` up by appending ``UP_ONE`` to its buffer:
    what calls would take is added to every request.

    Attributes:
        adapter: Where it is recorded; ``None`` once it has ended.
        source: The request.
        method: Its method, as the client spelled it.
        route: The route's template, `UNMATCHED` if it isn't known yet, ``None`` if nothing is to be recorded.
        labels: What `Adapter.further_labels` returned, if that was called before the end.
        received: Bytes of its body, if the adapter wants ``body_sizes``.
        sent: Bytes of the answer's body, likewise.
        start: When it began, on the registry's clock.
    """

    __slots__ = ("adapter", "labels", "method", "received", "route", "sent", "source", "start")
    adapter: Adapter | None
    source: Any
    method: str
    route: str | None
    labels: Mapping[str, Any]
    received: int
    sent: int
    start: float

    def end(self, status: str | int) -> None:
        """Record that it ended now, with ``status``. What fails in here is logged and never raised."""
        adapter = self.adapter
        if adapter is None:
            return
        self.adapter = None
        now = adapter.clock()
        active = adapter.active
        steps = active._buffer
        steps.append(DOWN_ONE)
        if len(steps) >= FULL:
            active._fold(now)
        try:
            if self.route is UNMATCHED:
                self.route = self.late_route(adapter)
                if self.route is UNMATCHED and adapter.strays:
                    adapter.stray(status)
            timer = adapter.timers.get((self.method, self.route, status)) or adapter.timer_of(self, status)
            if timer is not None:
                # What follows is Timer._record(). After the application's code most of what is run here has
                # to be fetched from memory again, so what counts is how many functions there are.
                if now >= timer._tick_end:
                    timer._fold(now)
                durations = timer._buffer
                durations.append(now - self.start)
                if len(durations) >= FULL:
                    timer._fold(now)
            if adapter.body_sizes:
                adapter.record_sizes(self)
        except Exception as error:
            adapter.complain("tapes could not record a request", error)
        self.source = None  # which has this exchange
        if adapter.registry.tells_at_request_end:
            adapter.tell()

    def late_route(self, adapter: Adapter) -> str | None:
        """Return the route's template, now that the application has been asked; see ``route``."""
        return UNMATCHED

    def __deepcopy__(self, memo: Any) -> Exchange:
        """Return itself: who copies the environ or the scope copies no exchange."""
        return self


def status_of(error: BaseException) -> str:
    """Return the status of a request that ended by ``error``.

    What is no error is a request that nobody waits for: its task was cancelled, its coroutine closed.
    """
    return "500" if isinstance(error, (Exception, KeyboardInterrupt, SystemExit)) else "499"


def is_complete(method: str, status: str | int, lengths: Iterable[str], sent: int) -> bool:
    """Return whether an answer has no byte missing, though its end was not sent.

    Args:
        method: The request's method.
        status: The answer's status.
        lengths: The values of its ``Content-Length``.
        sent: How many bytes of its body were sent.
    """
    return method == "HEAD" or str(status) in ("204", "304") or str(sent) in lengths


def _known(method: str) -> str:
    return method if method in METHODS else "_OTHER"


def _is_below(path: Any) -> bool:
    return isinstance(path, str) and path.startswith("/") and path.endswith("/*")


def _paths(name: str, paths: Iterable[str]) -> frozenset[str]:
    """Return ``paths`` with and without a trailing slash."""
    for path in paths:
        if not isinstance(path, str) or not path.startswith("/"):
            raise InvalidArgument(name, got=path, expected=f"a path like {_EXAMPLES[name]}")
    return frozenset(form for path in paths for form in (path.rstrip("/") or "/", path.rstrip("/") + "/"))


_EXAMPLES = {"metrics_path": "'/metrics', or None", "exclude": "'/health' or '/static/*'"}
