"""An ASGI application and its server see the same messages and scopes as without the adapter."""

from __future__ import annotations

import anyio
import pytest

from tapes.contrib.asgi import TapesMiddleware
from tests.contrib.asgi.server import Answer, plain, receiving
from tests.contrib.recorded import active, counts

ENDINGS = {
    "body": [{"type": "http.response.body", "body": b"x"}],
    "bodies": [
        {"type": "http.response.body", "body": b"x", "more_body": True},
        {"type": "http.response.body"},
    ],
    "pathsend": [{"type": "http.response.pathsend", "path": "/x"}],
    "zerocopysend": [
        {"type": "http.response.zerocopysend", "file": 3, "more_body": True},
        {"type": "http.response.zerocopysend", "file": 3},
    ],
    "trailers": [
        {"type": "http.response.body", "body": b"x"},
        {"type": "http.response.trailers", "headers": [], "more_trailers": True},
        {"type": "http.response.trailers", "headers": []},
    ],
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_message_and_scope_passes_through_as_it_is(registry, ending):
    """The same objects pass, extensions included, and the request ends with the last message, not before."""
    start = {"type": "http.response.start", "status": 200, "trailers": ending == "trailers"}
    others = [{"type": "http.response.debug", "info": {}}, {"type": "http.response.push", "path": "/y"}]
    messages = [*others, start, *ENDINGS[ending]]
    request = {"type": "http.request", "body": b"in", "more_body": False}
    scope = {"type": "http", "method": "GET", "path": "/", "extensions": {"http.response.push": {}}}
    before, seen = dict(scope), []

    async def app(got_scope, receive, send):
        assert got_scope is scope
        assert scope == before
        assert await receive() is request
        for message in messages:
            assert active(registry) == 1
            await send(message)
            seen.append(counts(registry))

    answer = Answer()
    anyio.run(TapesMiddleware(app, registry), scope, receiving(request), answer.send)
    assert all(got is sent for got, sent in zip(answer.messages, messages))
    assert len(answer.messages) == len(messages)
    assert [bool(count) for count in seen] == [False] * (len(messages) - 1) + [True]


def test_scopes_without_optional_keys(registry):
    """A scope may have its type alone, and its headers may be an iterator, left to the application."""

    async def app(scope, receive, send):
        assert list(scope.get("headers", ())) in ([], [(b"a", b"b")])
        await plain(scope, receive, send)

    app = TapesMiddleware(app, registry)
    anyio.run(app, {"type": "http"}, receiving(), Answer().send)
    anyio.run(app, {"type": "http", "headers": iter([(b"a", b"b")])}, receiving(), Answer().send)
    assert sum(counts(registry).values()) == 2


def test_other_scopes_pass_through(registry):
    """A scope of an unknown type passes through with the same receive and send."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    arguments = ({"type": "telepathy"}, receiving(), Answer().send)
    anyio.run(TapesMiddleware(app, registry), *arguments)
    assert seen == [arguments]
