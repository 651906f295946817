"""Request metrics and ``/metrics`` for Flask.

tapes = Tapes(app)                                     # or tapes.init_app(app), in a factory
app.wsgi_app = TapesMiddleware(app.wsgi_app)           # the same, as any WSGI application has it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, Unpack

from tapes.contrib.options import Options, complete, with_options
from tapes.contrib.wsgi import TapesMiddleware
from tapes.errors import InvalidArgument, MissingExtra
from tapes.registry import Registry

try:
    from flask import Flask
except ModuleNotFoundError:
    raise MissingExtra("tapes.contrib.flask", "flask") from None

__all__ = ["Tapes", "TapesMiddleware"]

F = TypeVar("F")

_MARK = "_tapes_leaves_out"


class Tapes:
    """An extension of Flask that puts `TapesMiddleware` around an application, and leaves views out.

    One extension serves any number of applications. Initialise it after other middleware is put around
    ``app.wsgi_app``: then it also measures the requests that the middleware answers. A second call for the
    same application does nothing.

    Args:
        app: The application; or call `init_app` later.
        registry: Where to record; the default registry if ``None``.
        options: ``metrics_path``, ``exclude``, ``labels``, ``body_sizes``, ``guard``, ``prefix``, ``route``;
            `tapes.contrib.options.Options` describes them.

    Raises:
        InvalidArgument, InvalidCall: If an option is out of its range, or does not exist.

    Example:
        >>> import flask, tapes
        >>> app = flask.Flask("shop")
        >>> metrics = Tapes(app, tapes.Registry())
        >>> @app.get("/health")
        ... @metrics.exclude
        ... def health():
        ...     return "fine"
        >>> app.test_client().get("/metrics").json["http"]["server"]["active_requests"]["value"]
        0
    """

    @with_options
    def __init__(
        self, app: Flask | None = None, registry: Registry | None = None, **options: Unpack[Options]
    ) -> None:
        self._registry, self._options = registry, complete(options)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Measure ``app`` from now on.

        Raises:
            InvalidArgument: If ``app`` is not a Flask application, or an option is out of its range.
        """
        if not isinstance(app, Flask):
            remedy = "TapesMiddleware takes any WSGI application"
            raise InvalidArgument("Tapes", got=app, expected="a flask.Flask", remedy=remedy)
        if "tapes" in app.extensions:
            return
        middleware = TapesMiddleware(app.wsgi_app, self._registry, **self._options)
        app.wsgi_app = middleware  # type: ignore[method-assign]
        middleware.leave_out(_marks_in(app.view_functions))
        app.extensions["tapes"] = self

    @staticmethod
    def exclude(view: F) -> F:
        """Do not measure a view or a class of views: a decorator, above or below that of the route."""
        setattr(view, _MARK, True)
        return view


def _marks_in(views: dict[str, Any]) -> Callable[[str], bool]:
    """Return a function that takes an endpoint and returns whether `Tapes.exclude` has marked its view."""
    known: dict[str, tuple[Any, bool]] = {}

    def is_marked(endpoint: str) -> bool:
        view, found = views.get(endpoint), known.get(endpoint)
        if found is None or found[0] is not view:
            marked = getattr(view, _MARK, False) or getattr(getattr(view, "view_class", None), _MARK, False)
            found = known[endpoint] = (view, bool(marked))
        return found[1]

    return is_marked
