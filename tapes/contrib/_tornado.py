"""How tapes watches an answer of Tornado's server, and finds the rule that led to it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tornado.httputil import HTTPInputError, HTTPServerRequest
from tornado.iostream import StreamClosedError
from tornado.routing import AnyMatches, PathMatches, RuleRouter
from tornado.web import Application, ErrorHandler, Finish, RequestHandler

from tapes.contrib._http import UNMATCHED, status_of

_EXECUTE = getattr(RequestHandler._execute, "__code__", None)


class Watch:
    """Watches one request on its connection, and calls `end` once, with its status.

    Its methods replace those of the same name on the instances. At the end it restores them, so no cycle is
    left, and it does not see what comes later, as on a websocket. Watches can be nested.
    """

    _hooks: Any = ()
    _callback: Callable[[], None] | None = None
    _status: int | None = None
    _is_error_page = False

    def watch(self, connection: Any, *more: str) -> None:
        self.received = self.sent = 0
        self._connection = connection
        self._hooks = []
        self._own: dict[str, Callable[..., Any]] = {}
        self.hook(connection, "set_close_callback", "write_headers", "finish", "close", "detach", *more)
        self._own["set_close_callback"](self._closed)

    def hook(self, owner: Any, *names: str) -> None:
        attributes = vars(owner)
        for name in names:
            if name not in self._own and hasattr(owner, name):
                self._own[name] = getattr(owner, name)
                self._hooks.append((attributes, name, attributes.get(name)))
                attributes[name] = getattr(self, name)

    def end(self, status: int) -> None:
        raise NotImplementedError

    def settle(self, status: int) -> None:
        self._unhook()
        self.end(status)

    def _unhook(self) -> None:
        hooks, self._hooks = self._hooks, []
        for attributes, name, before in hooks:
            if attributes.get(name) == getattr(self, name):  # else a later watch hooked it, and calls this
                if before is None:
                    del attributes[name]
                else:
                    attributes[name] = before
        if hooks:
            callback, self._callback = self._callback, None
            self._own["set_close_callback"](callback)

    def broken_off(self) -> int:
        """Return the status of an answer without a last byte."""
        error = sys.exc_info()[1]
        if isinstance(error, HTTPInputError):
            return 400  # an invalid body, which the connection has refused
        if error is not None and not self._is_closed():
            return int(status_of(error))
        is_complete = getattr(self._connection, "_expected_content_remaining", None) == 0
        return self._status if is_complete and self._status is not None else 499

    def _is_closed(self) -> bool:
        stream = getattr(self._connection, "stream", None)
        return stream is not None and stream.closed()

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        if self._hooks:
            self._callback = callback
        else:
            self._own["set_close_callback"](callback)

    def write_headers(self, start_line: Any, headers: Any, chunk: Any = None) -> Any:
        future = self._own["write_headers"](start_line, headers, chunk)
        code = int(getattr(start_line, "code", 200))
        self._status = code if code >= 200 or code == 101 else None
        self._is_error_page = _uncaught() is not None
        self.sent += len(chunk or b"")
        return future

    def write(self, chunk: bytes) -> Any:
        self.sent += len(chunk)
        return self._own["write"](chunk)

    def data_received(self, chunk: bytes) -> Any:
        self.received += len(chunk)
        return self._own["data_received"](chunk)

    def finish(self) -> None:
        status = self._status or 200  # none if the headers were written by write()
        error = None if self._is_error_page else _uncaught()
        if error is not None and not isinstance(error, StreamClosedError):
            status = int(status_of(error))
        elif self._is_closed():
            status = self.broken_off()
        self._unhook()  # first, as a finished connection drops its callbacks
        try:
            self._own["finish"]()
        except BaseException as failure:
            status = int(status_of(failure))
            raise
        finally:
            self.end(status)

    def detach(self) -> Any:
        self.settle(self._status or 101)
        return self._own["detach"]()

    def close(self) -> None:
        self.settle(self.broken_off())
        self._own["close"]()

    def on_connection_close(self) -> None:
        self._end_by(self._own["on_connection_close"])

    def _closed(self) -> None:
        callback, self._callback = self._callback, None
        self._end_by(callback or (lambda: None))

    def _end_by(self, callback: Callable[[], None]) -> None:
        status = self.broken_off()
        try:
            callback()  # first, as a nested watch has to end before this one
        finally:
            self.settle(status)

    def __del__(self) -> None:
        if self._hooks:  # a request that is dropped ends too: none stays active for ever
            self.end(499)


def _uncaught() -> BaseException | None:
    """Return the exception that left a handler and that Tornado is about to answer."""
    _, error, traceback = sys.exc_info()
    is_left = traceback is not None and traceback.tb_frame.f_code is _EXECUTE
    return error if is_left and not isinstance(error, Finish) else None


class _Rule(NamedTuple):
    """The matchers from the outermost router to a rule, the last pattern of a path, and the route's name."""

    matchers: tuple[Any, ...]
    regex: Any
    name: str


class Routes:
    """Finds the rule that led to a handler by the handler's class; most classes have one rule."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._index: tuple[int, list[Any], dict[Any, list[_Rule]]] = -1, [], {}

    def of(self, request: HTTPServerRequest, delegate: Any) -> str:
        # 1. Index the rules by handler, again if rules were added.
        size, routers, index = self._index
        if size != sum([len(router.rules) for router in routers]):
            routers, index = [], {}
            for target, rule in _walk(self._application, (), None, routers):
                index.setdefault(target, []).append(rule)
            self._index = sum([len(router.rules) for router in routers]), routers, index
        # 2. Look up the handler. One for errors or for unmatched paths is not a route.
        handler = getattr(delegate, "handler_class", None)
        for_unmatched = handler and delegate.application.settings.get("default_handler_class")
        is_error = handler is not None and (issubclass(handler, ErrorHandler) or handler is for_unmatched)
        # 3. Choose the rule that matches; a handler with one rule needs its pattern alone.
        rules = index.get(handler, [])
        if len(rules) == 1 and not is_error and rules[0].regex and rules[0].regex.match(request.path):
            return rules[0].name
        for rule in rules if is_error else [*rules, *index.get(None, ())]:
            if all(matcher.match(request) is not None for matcher in rule.matchers):
                return rule.name
        return UNMATCHED if is_error or handler is None else str(handler.__name__)

    def has_rule(self, paths: Iterable[str], ours: type[RequestHandler]) -> bool:
        """Return whether a rule for exactly one of ``paths`` leads to another handler than ``ours``."""
        for handler, rule in _walk(self._application, (), None, []):
            patterns = [matcher.regex for matcher in rule.matchers if isinstance(matcher, PathMatches)]
            is_exact = bool(patterns) and rule.name.removesuffix("/?").rstrip("/") in paths
            is_ours = handler is not None and issubclass(handler, ours)
            if is_exact and not is_ours and any(all(p.match(path) for p in patterns) for path in paths):
                return True
        return False


def _walk(router: Any, above: tuple[Any, ...], regex: Any, routers: list[Any]) -> Iterator[tuple[Any, _Rule]]:
    router = getattr(router, "default_router", router)
    routers.append(router)
    for rule in router.rules:
        target, matcher = rule.target, rule.matcher
        matchers = above if type(matcher) is AnyMatches else (*above, matcher)
        last = matcher.regex if isinstance(matcher, PathMatches) else regex
        if isinstance(target, (RuleRouter, Application)):
            yield from _walk(target, matchers, last, routers)
            continue
        name = getattr(target, "__name__", type(target).__name__)
        if last is not None:
            name = re.sub(r"^\^|(?<!\\)\$$", "", last.pattern)
        is_handler = isinstance(target, type) and issubclass(target, RequestHandler)
        yield target if is_handler else None, _Rule(matchers, last, name)
