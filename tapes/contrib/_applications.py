"""Finds the frameworks' objects within an application, from its outermost callable.

Middlewares keep what they wrap in an attribute or in a closure. So an adapter can find the frameworks' own
objects, and ask them whether one of their routes has the path of the metrics, and which route matches a
request. It asks for the few requests without a route in their environ or scope: a middleware has copied that.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tapes.contrib._routes import template_of, templates_in

_log = logging.getLogger("tapes.contrib")

_WRAPPED = ("app", "_app", "wsgi_app", "asgi_app", "application", "_application", "__wrapped__", "func")
_MAX_LAYERS = 50  # maximum number of objects that are looked at


class Application:
    """The frameworks' objects within ``outermost``, which are looked up at first use."""

    def __init__(self, outermost: Any) -> None:
        self.outermost = outermost
        self.may_have_routes = True  # whether one of them may know routes
        self._found: dict[str, Any] | None = None

    @property
    def flask(self) -> Any:
        return self._get("flask")

    def rule_of(self, environ: Mapping[str, Any]) -> Any:
        """Return the rule of Flask that matches a request; ``None`` if none does, or there is no Flask."""
        flask = self.flask
        if flask is None or self._get("mounts") is not None:  # mounts change the path
            return None
        try:
            return flask.url_map.bind_to_environ(environ).match(return_rule=True)[0]
        except Exception:  # 404, 405 and redirects
            return None

    def django_route_of(self, path: str) -> str | None:
        """Return Django's template for a path; ``None`` if none matches, or there is no Django."""
        if self._get("django") is None:
            return None
        urls: Any = sys.modules["django.urls"]
        try:
            return "/" + str(urls.resolve(path).route)
        except Exception:  # 404
            return None

    def route_of(self, scope: Mapping[str, Any], path: str) -> str | None:
        """Return the template of the route that would answer an ASGI scope; ``None`` if it can't be found."""
        litestar, router = self._get("litestar"), self._get("router")
        try:
            if litestar is not None:
                return str(litestar.asgi_router.handle_routing(path=path, method=scope["method"])[-1])
            if router is not None:
                return template_of(router.routes, scope, path)
            return self.django_route_of(path)
        except Exception:  # Litestar's 404 and 405, or a route that overrides how it matches
            _log.debug("tapes can't find the route of %s", path, exc_info=True)
            return None

    def has_route(self, paths: Iterable[str]) -> bool:
        """Return whether a route, other than one that matches every path, or a mount has one of ``paths``."""
        wanted = {path.rstrip("/") for path in paths} - {""}
        return any(template.rstrip("/") in wanted for template in self._templates())

    def _templates(self) -> Iterator[str]:
        mounts, werkzeug = self._get("mounts"), self.flask or self._get("quart")
        yield from mounts.mounts if mounts is not None else ()
        if werkzeug is not None:
            yield from (str(rule.rule) for rule in werkzeug.url_map.iter_rules())
        for name in ("router", "litestar"):
            found = self._get(name)
            if found is not None:
                yield from templates_in(found.routes)
        if self._get("django") is not None:
            resolver = sys.modules["django.urls"].get_resolver()
            yield from ("/" + str(pattern.pattern) for pattern in resolver.url_patterns)

    def _get(self, name: str) -> Any:
        if self._found is None:
            found: dict[str, Any] = {}
            for layer in _layers(self.outermost):
                found.setdefault(_kind_of(layer), _reference(layer))
            self._found = found
            self.may_have_routes = not found.keys() <= {"", "mounts", "quart"}
        reference = self._found.get(name)
        return None if reference is None else reference()


def _reference(layer: Any) -> Any:
    """Return a weak reference: an application that is dropped has to be freed at once."""
    try:
        return weakref.ref(layer)
    except TypeError:
        return lambda: layer


def _layers(outermost: Any) -> Iterator[Any]:
    """Yield an application and what it wraps, from the outside to the inside."""
    waiting, seen = [outermost], set[int]()
    while waiting and len(seen) < _MAX_LAYERS:
        layer = waiting.pop(0)
        if id(layer) in seen or not callable(layer):
            continue
        seen.add(id(layer))
        yield layer
        waiting += _wrapped_by(layer)


def _wrapped_by(layer: Any) -> list[Any]:
    """Return what ``layer`` may wrap. No code of ``layer`` runs: a proxy may raise for any attribute."""
    kind = type(layer)
    found: list[Any] = []
    if kind is types.MethodType:
        found.append(layer.__self__)
    elif issubclass(kind, functools.partial):
        found.append(layer.func)
    elif kind is types.FunctionType:
        for cell in layer.__closure__ or ():
            with contextlib.suppress(ValueError):  # it is empty
                found.append(cell.cell_contents)
    try:
        own = object.__getattribute__(layer, "__dict__")
    except Exception:
        return found
    return found + [own[name] for name in _WRAPPED if name in own]


_CLASSES = (
    ("flask", "flask", "Flask"),
    ("quart", "quart", "Quart"),
    ("litestar", "litestar", "Litestar"),
    ("router", "starlette.applications", "Starlette"),
    ("router", "starlette.routing", "Router"),
    ("django", "django.core.handlers.wsgi", "WSGIHandler"),
    ("django", "django.core.handlers.asgi", "ASGIHandler"),
    ("mounts", "werkzeug.middleware.dispatcher", "DispatcherMiddleware"),
)


def _kind_of(layer: Any) -> str:
    for kind, module, name in _CLASSES:
        found = getattr(sys.modules.get(module), name, None)
        if found is not None and issubclass(type(layer), found):
            return kind
    return ""
