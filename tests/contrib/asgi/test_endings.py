"""When an ASGI request ends, and with which status."""

from __future__ import annotations

from enum import Enum
from http import HTTPStatus

import anyio
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse
from starlette.routing import Route

import tapes
from tapes.contrib.asgi import TapesMiddleware
from tapes.testing import ManualClock
from tests.contrib.asgi.server import BACKENDS, Answer, ask, plain, receiving, scope_of
from tests.contrib.recorded import active, counts


def test_a_status_is_a_number_whatever_its_type(registry):
    """HTTPStatus.OK, another enum and 200 are recorded as one status."""

    class Status(int, Enum):
        OK = 200

    for status in (HTTPStatus.OK, Status.OK, 200):

        async def app(scope, receive, send, status=status):
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": None})

        ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "200"): 3}


def test_an_answer_whose_trailers_never_come_was_one(registry):
    """An answer with a complete body keeps its status if its trailers never come."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})

    ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_is_timed_to_its_last_byte_and_no_longer(backend):
    """A stream of 1 s is recorded as 1 s; a background task that follows adds nothing."""
    clock = ManualClock(100.0)
    registry = tapes.Registry(clock=clock)

    async def numbers():
        for _ in range(4):
            clock.advance(0.25)
            yield b"x"

    async def stream(request):
        return StreamingResponse(numbers(), background=BackgroundTask(background))

    async def background():
        assert active(registry) == 0
        clock.advance(60.0)

    app = TapesMiddleware(Starlette(routes=[Route("/", stream)]), registry)
    assert ask(app, backend=backend).body == b"xxxx"
    (series,) = registry.snapshot().series("http.server.request.duration")
    assert (series.count, series.sum) == (1, 1.0)


def test_an_exception_after_the_last_byte_is_none(registry):
    """An exception after the whole answer, as of a background task, leaves the status as it was."""

    async def app(scope, receive, send):
        await plain(scope, receive, send)
        raise RuntimeError("too late")

    with pytest.raises(RuntimeError, match="too late"):
        ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_clients_that_go_away_are_499(registry, backend):
    """A disconnect in receive(), an error of send() and a cancelled task are each recorded as 499."""

    async def listens(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    async def ignores(scope, receive, send):
        await receive()
        await receive()
        await plain(scope, receive, send)

    async def never_answers(scope, receive, send):
        await receive()
        await receive()

    async def waits(scope, receive, send):
        await anyio.sleep_forever()

    async def broken_pipe(message):
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    async def main():
        for app in (listens, ignores, never_answers):
            receive = receiving({"type": "http.request"}, {"type": "http.disconnect"})
            await TapesMiddleware(app, registry)(scope_of(), receive, Answer().send)
        with pytest.raises(BrokenPipeError):
            await TapesMiddleware(plain, registry)(scope_of(), receiving(), broken_pipe)
        with anyio.move_on_after(0.01):
            await TapesMiddleware(waits, registry)(scope_of(), receiving(), Answer().send)

    anyio.run(main, backend=backend)
    assert counts(registry) == {("GET", "<unmatched>", "499"): 5}
    assert active(registry) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_at_the_same_time_have_nothing_in_common(backend):
    """Each of 20 requests at the same time has its own status, route and duration, and all are active."""
    clock = ManualClock(100.0)
    registry = tapes.Registry(clock=clock)

    async def main():
        gates = [anyio.Event() for _ in range(20)]

        async def waiting(scope, receive, send):
            number = int(scope["path"][1:])
            scope["tapes.route"] = f"/{number % 2}"
            await gates[number].wait()
            await send({"type": "http.response.start", "status": 200 + number % 4, "headers": []})
            await send({"type": "http.response.body"})

        app = TapesMiddleware(waiting, registry)
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(app, scope_of(f"/{number}"), receiving(), Answer().send)
            await anyio.wait_all_tasks_blocked()
            assert active(registry) == 20
            for gate in reversed(gates):
                clock.advance(1.0)
                gate.set()
                await anyio.wait_all_tasks_blocked()

    anyio.run(main, backend=backend)
    expected = {("GET", f"/{number % 2}", str(200 + number)): 5 for number in range(4)}
    assert counts(registry) == expected
    assert sum(s.sum for s in registry.snapshot().series("http.server.request.duration")) == sum(range(1, 21))
    assert active(registry) == 0


def test_an_application_that_never_answers_is_a_500(registry):
    """An application that returns without an answer is recorded as 500, which the server sends."""

    async def app(scope, receive, send):
        pass

    ask(TapesMiddleware(app, registry))
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}
