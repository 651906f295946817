"""The full template of the route that Starlette or FastAPI matched, from what they leave in the scope.

A route knows its own path, but not where it is mounted, and ``root_path`` has the mount's path as the client
spelled it, which for ``/tenants/{tenant}`` is a raw path. So below a mount, the template is looked up by the
endpoint, in an index of the whole tree of routes. If it is not there, the route is a part of the template, or
unmatched, but never a raw path. If the scope was copied on its way to the router, `template_of` chooses the
route as the router did.

Older versions of Starlette leave only the endpoint, which is enough. FastAPI does not merge the routers that
it includes, and leaves the full path in a context of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_ANYTHING = "/{path:path}"
_MAX_UNKNOWN = 1000  # maximum number of endpoints without a route that are remembered
_MAX_WRAPPED = 20  # maximum number of middlewares that are looked into


class Templates:
    def __init__(self) -> None:
        self._by_endpoint: dict[int, list[_Leaf]] = {}
        self._unknown: dict[int, Any] = {}

    def of(self, scope: Mapping[str, Any], root_path: str, path_at_first: str) -> str | None:
        """Return the template of a scope that has been routed; ``None`` if no route matched.

        ``root_path`` is that of the scope as the server had set it, ``path_at_first`` the path below it: old
        versions of Starlette cut both at every mount.
        """
        route = scope.get("route")
        path = None
        if route is not None and not hasattr(route, "routes"):
            path = getattr(route, "path", None)
            if "fastapi" in scope:
                path = _path_of_included(scope["fastapi"], route) or path
            if path is not None and scope.get("root_path", "") == root_path:
                return str(path)
        endpoint = scope.get("endpoint")
        if endpoint is None:
            return path
        leaves = self._leaves_of(endpoint, scope.get("router"))
        if len(leaves) > 1:
            leaves = [leaf for leaf in leaves if leaf.matches(path_at_first)]
        return leaves[0].template if leaves else path

    def _leaves_of(self, endpoint: Any, router: Any) -> list[_Leaf]:
        leaves = self._by_endpoint.get(id(endpoint))
        if leaves is not None and leaves[0].endpoint is endpoint:
            return leaves
        if self._unknown.get(id(endpoint)) is endpoint:
            return []
        index: dict[int, list[_Leaf]] = {}  # routes may have been added since
        for leaf in _walk(getattr(router, "routes", ())):
            index.setdefault(id(leaf.endpoint), []).append(leaf)
        self._by_endpoint = index
        if id(endpoint) not in index and len(self._unknown) < _MAX_UNKNOWN:
            self._unknown[id(endpoint)] = endpoint
        return index.get(id(endpoint), [])


class _Leaf(NamedTuple):
    """A route with an endpoint, its full template, and the patterns of the mounts around it and its own."""

    endpoint: Any
    template: str
    patterns: tuple[Any, ...]

    def matches(self, path: str) -> bool:
        *mounts, own = self.patterns
        for mount in mounts:
            match = mount.match(path)
            if match is None:
                return False
            path = "/" + match.group("path")
        return own.match(path) is not None


def template_of(routes: Iterable[Any], scope: Mapping[str, Any], path: str) -> str | None:
    """Return the template of the route that Starlette or FastAPI would choose; ``None`` if none matches.

    As a router does, it takes the first route that matches fully, or else the first that matches except for
    the method. A mounted application answers for every path below it. ``path`` is the path of the scope below
    its ``root_path``.
    """
    own = {**scope, "path": path, "root_path": "", "path_params": {}}
    own.pop("fastapi", None)
    partial = None
    for route in _flat(routes):
        match, child_scope = route.matches(own)
        if match.name == "PARTIAL":
            partial = partial or route.path
        elif match.name == "FULL":
            template: str = getattr(route, "path", "")
            if not hasattr(route, "routes"):
                return template
            inner = _routes_in(route)
            if not inner:
                return template + _ANYTHING
            below = path_below(path, child_scope.get("root_path", ""))
            found = template_of(inner, scope, child_scope.get("path", below))
            return None if found is None else template + found
    return partial


def templates_in(routes: Iterable[Any]) -> Iterator[str]:
    """Yield the templates of an application's routes, and the paths of its mounts."""
    for leaf in _walk(routes):
        yield leaf.template.removesuffix(_ANYTHING)
    for route in routes:
        if not hasattr(route, "path_regex"):  # of Litestar
            yield str(getattr(route, "path", ""))


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Yield ``routes``, with those of FastAPI's included routers in the place of the routers."""
    for route in routes:
        included = getattr(route, "effective_route_contexts", None)
        if included is None:
            yield route
        else:
            yield from _flat(one.starlette_route or one for one in included())


def _walk(routes: Iterable[Any], above: str = "", patterns: tuple[Any, ...] = ()) -> Iterator[_Leaf]:
    for route in _flat(routes):
        path, pattern = getattr(route, "path", ""), getattr(route, "path_regex", None)
        inner = _routes_in(route)
        here = patterns if pattern is None else (*patterns, pattern)
        if not hasattr(route, "routes"):
            endpoint = getattr(route, "endpoint", None)
            if endpoint is not None and pattern is not None:
                yield _Leaf(endpoint, above + path, here)
        elif inner:
            yield from _walk(inner, above + path, here)
        elif pattern is not None:  # a mounted application without routes
            yield _Leaf(getattr(route, "app", None), above + path + _ANYTHING, here)


def _routes_in(route: Any) -> Iterable[Any]:
    """Return the routes of a mounted application, also within middleware, which keeps it as ``app``."""
    for _ in range(_MAX_WRAPPED):
        routes: Iterable[Any] = getattr(route, "routes", ())
        if routes:
            return routes
        route = getattr(route, "app", None)
    return ()


def _path_of_included(fastapi: Any, route: Any) -> str | None:
    context = fastapi.get("effective_route_context") if isinstance(fastapi, dict) else None
    if context is not None and getattr(context, "original_route", None) is route:
        return getattr(context, "path", None)
    return None


def path_below(path: str, root_path: str) -> str:
    """Return ``path`` without ``root_path``, which some servers leave in it and some don't."""
    root_path = root_path.rstrip("/")
    return path[len(root_path) :] if path.startswith(root_path + "/") else path
