"""The options that every adapter takes, with their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, TypeVar

from tapes.errors import InvalidCall

__all__ = ["DEFAULTS", "Guard", "LabelsOf", "Options", "RouteOf", "complete", "with_options"]

LabelsOf = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None
Guard = Callable[[Any], Any] | None
RouteOf = Callable[[Any], str | None] | None


class Options(TypedDict, total=False):
    """The options of an adapter: all are keywords, and all have a default.

    Three of them take a callable, which gets the *request*: the environ in WSGI and Flask, the scope in ASGI,
    the ``HTTPServerRequest`` in Tornado.

    Attributes:
        metrics_path: Path of the metrics, with and without a trailing slash; default ``"/metrics"``. With
            ``None`` the adapter answers no requests.
        exclude: Paths that are not measured, with and without a trailing slash; default ``()``.
            ``"/static/*"`` excludes every path below ``/static/``.
        labels: Additional labels of the requests: a mapping, or a callable that takes the request and returns
            one; default ``None``. WSGI calls it when the answer starts, in Flask's request context; ASGI and
            Tornado call it when the answer is complete.
        body_sizes: Whether to record the sizes of request and response bodies, in bytes; default ``False``.
        guard: A callable that takes the request and returns whether the client may read the metrics; the
            others get status 403. It may be asynchronous, except in WSGI and Flask. With ``None``, the
            default, clients have to send the token in ``TAPES_METRICS_TOKEN`` if that is set.
        prefix: Prefix of the metrics' names, without the dot that follows it; default ``""``.
        route: A callable that takes the request and returns the template of its route, or ``None`` if it
            has none; default ``None``. Use it for frameworks that the adapter does not know.
    """

    metrics_path: str | None
    exclude: Iterable[str]
    labels: LabelsOf
    body_sizes: bool
    guard: Guard
    prefix: str
    route: RouteOf


DEFAULTS: Options = {
    "metrics_path": "/metrics", "exclude": (), "labels": None, "body_sizes": False,
    "guard": None, "prefix": "", "route": None,
}  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


def complete(options: Options) -> Options:
    """Return ``options`` with the defaults of those that are missing; raises InvalidCall for other names."""
    for name in options:
        if name not in DEFAULTS:
            from difflib import get_close_matches  # it is needed for this error alone

            close = get_close_matches(name, DEFAULTS, 1)
            remedy = f"did you mean {close[0]!r}?" if close else ""
            raise InvalidCall(
                "unexpected keyword argument of an adapter",
                got=name, expected=f"one of {', '.join(DEFAULTS)}", remedy=remedy,
            )  # fmt: skip
    return {**DEFAULTS, **options}


def with_options(function: F) -> F:
    """Show each option in the signature of a function that takes ``**options``, for help() and editors."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(name, keyword_only, default=value) for name, value in DEFAULTS.items()]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function
