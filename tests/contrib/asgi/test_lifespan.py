"""The lifespan of an ASGI application: it passes through, and is used to join and to leave the service."""

from __future__ import annotations

from contextlib import nullcontext

import anyio
import pytest

from tapes.contrib.asgi import TapesMiddleware
from tests.contrib.asgi.server import BACKENDS, Answer, Connected, plain, receiving, scope_of


def test_the_lifespan_passes_through(registry):
    """The messages of the lifespan, its state and its errors are those of the application."""

    async def app(scope, receive, send):
        assert (await receive())["type"] == "lifespan.startup"
        scope["state"]["db"] = 1
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        await send({"type": "lifespan.shutdown.complete"})

    async def has_none(scope, receive, send):
        raise ValueError("no lifespan")

    scope, answer = {"type": "lifespan", "state": {}}, Answer()
    receive = receiving({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    anyio.run(TapesMiddleware(app, registry), scope, receive, answer.send)
    assert [m["type"] for m in answer.messages] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert scope["state"] == {"db": 1}
    with pytest.raises(ValueError, match="no lifespan"):
        anyio.run(TapesMiddleware(has_none, registry), {"type": "lifespan"}, receiving(), Answer().send)


async def raises(scope, receive, send):
    raise ValueError("no lifespan")


async def returns(scope, receive, send):
    pass


async def starts_badly(scope, receive, send):
    await receive()
    raise ValueError("no database")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("application", [raises, returns, starts_badly])
def test_a_lifespan_that_the_application_does_not_know(registry, monkeypatch, application, backend):
    """The adapter answers an unsupported lifespan, to leave the service; a failed start passes through."""
    registry.use(Connected(registry))
    calls = []
    app, answer = TapesMiddleware(application, registry), Answer()
    monkeypatch.setattr(type(app._adapter.service), "leave", lambda self: calls.append(len(answer.messages)))
    receive = receiving({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    with pytest.raises(ValueError, match="no database") if application is starts_badly else nullcontext():
        anyio.run(app, {"type": "lifespan"}, receive, answer.send, backend=backend)
    completed = ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert [m["type"] for m in answer.messages] == ([] if application is starts_badly else completed)
    assert calls == ([] if application is starts_badly else [1])


def test_who_leaves_at_the_end_of_a_lifespan_joins_once_again(registry, monkeypatch):
    """After the process left its service, the next request joins it again, and later ones do not."""
    app = TapesMiddleware(plain, registry)
    service, calls = app._adapter.service, []
    monkeypatch.setattr(type(service), "begin", lambda self: self.mark.__setitem__(0, 1) or True)
    monkeypatch.setattr(type(service), "join", lambda self: calls.append("join"))
    registry.use(Connected(registry))
    monkeypatch.setattr(
        type(service), "leave", lambda self: calls.append("leave") or self.mark.__setitem__(0, 0)
    )

    async def main():
        for _ in range(3):
            await app(scope_of(), receiving(), Answer().send)
        service.leave()
        for _ in range(3):
            await app(scope_of(), receiving(), Answer().send)

    anyio.run(main)
    assert calls == ["join", "leave", "join"]
