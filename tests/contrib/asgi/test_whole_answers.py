"""A complete answer keeps its status, also if the server reports the end while it still writes."""

from __future__ import annotations

import anyio
import pytest
from starlette.responses import StreamingResponse

from tapes.contrib.asgi import TapesMiddleware
from tests.contrib.asgi.server import BACKENDS, Answer, plain, receiving, scope_of
from tests.contrib.recorded import active, counts

OLD = {"version": "3.0", "spec_version": "2.1"}  # where Starlette listens for a disconnect while it streams


def start(*lengths, status=200, **more):
    headers = [(b"content-length", length) for length in lengths]
    return {"type": "http.response.start", "status": status, "headers": headers, **more}


def body(data=b"", more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


async def exchange(app, registry, ends, method="GET"):
    """Run one request; the server reports a disconnect while it takes the message that ``ends`` picks."""
    over = anyio.Event()

    async def receive():
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if ends(message):
            over.set()
            await anyio.sleep_forever()

    async def listening(scope, receive, send):
        async with anyio.create_task_group() as tasks:

            async def listen():
                await receive()
                tasks.cancel_scope.cancel()

            tasks.start_soon(listen)
            await app(scope, receive, send)
            tasks.cancel_scope.cancel()

    with anyio.fail_after(10):
        await TapesMiddleware(listening, registry)(scope_of(method=method), receive, send)


def sending(*messages):
    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return app


def is_last(message):
    return message["type"] == "http.response.body" and not message["more_body"]


def is_first(message):
    return message.get("more_body", False)


def is_trailers(message):
    return message["type"] == "http.response.trailers"


TRAILERS = {"type": "http.response.trailers", "headers": []}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("messages", "ends", "method", "status"),
    [
        pytest.param([start(), body(b"all")], is_last, "GET", 200, id="last piece"),
        pytest.param([start(), body(b"al", True), body(b"l")], is_last, "GET", 200, id="last of two"),
        pytest.param([start(), body(b"all", True), body()], is_last, "GET", 200, id="empty last piece"),
        pytest.param([start(status=500), body(b"x")], is_last, "GET", 500, id="another status"),
        pytest.param([start(trailers=True), body(b"x"), TRAILERS], is_trailers, "GET", 200, id="trailers"),
        pytest.param([start(trailers=True), body(b"x"), TRAILERS], is_last, "GET", 499, id="no trailers"),
        pytest.param([start(b"3"), body(b"all", True), body()], is_first, "GET", 200,
                     id="whole length"),
        pytest.param([start(b"4"), body(b"all", True), body(b"!")], is_first, "GET", 499,
                     id="part of the length"),
        pytest.param([start(), body(b"all", True), body()], is_first, "GET", 499,
                     id="no length"),
        pytest.param([start(b"3"), body(b"", True), body()], is_first, "HEAD", 200, id="HEAD"),
        pytest.param([start(status=304), body(b"", True), body()], is_first, "GET", 304,
                     id="304"),
        pytest.param([start(), body(b"all")], lambda m: "status" in m, "GET", 499, id="before the body"),
    ],
)  # fmt: skip
def test_a_disconnect_while_the_server_writes(registry, backend, messages, ends, method, status):
    """A disconnect while the server writes is a 499 only if a part of the answer was missing."""

    async def main():
        await exchange(sending(*messages), registry, ends, method)

    anyio.run(main, backend=backend)
    assert counts(registry) == {(method, "<unmatched>", str(status)): 1}
    assert active(registry) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_of_starlette_that_ends_while_its_last_piece_is_written(registry, backend):
    """A stream that Starlette cancels while its last piece is written is complete, so it keeps its status."""

    async def app(scope, receive, send):
        async def pieces():
            yield b"all of it"

        await StreamingResponse(pieces())({**scope, "asgi": OLD}, receive, send)

    anyio.run(exchange, app, registry, is_last, backend=backend)
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}


def test_a_last_piece_that_can_not_be_written_is_499(registry):
    """If the last piece can not be written, the status is 499, whatever the length of the answer."""

    async def broken_pipe(message):
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    async def main():
        with pytest.raises(BrokenPipeError):
            await TapesMiddleware(sending(start(b"3"), body(b"all")), registry)(
                scope_of(), receiving(), broken_pipe
            )

    anyio.run(main)
    assert counts(registry) == {("GET", "<unmatched>", "499"): 1}


def test_a_cancelled_last_piece_without_a_disconnect_is_499(registry):
    """If the task is cancelled, and the server has not reported the end, the status is 499."""

    async def stuck(message):
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    async def main():
        with anyio.move_on_after(0.01):
            await TapesMiddleware(plain, registry)(scope_of(), receiving(), stuck)

    anyio.run(main)
    assert counts(registry) == {("GET", "<unmatched>", "499"): 1}


def test_a_refused_handshake_whose_end_is_reported_while_it_is_written(registry):
    """A handshake that the application refuses keeps its status if the end is reported meanwhile."""

    async def refuse(scope, receive, send):
        async with anyio.create_task_group() as tasks:

            async def listen():
                await receive()
                await receive()
                tasks.cancel_scope.cancel()

            tasks.start_soon(listen)
            if scope["path"] == "/close":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
                await send({"type": "websocket.http.response.body", "body": b"no"})

    async def main():
        for path in ("/close", "/response"):
            over = anyio.Event()
            answer = Answer()

            left = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1006}]

            async def receive(over=over, left=left):
                if len(left) == 1:
                    await over.wait()
                return left.pop(0)

            async def send(message, over=over, answer=answer):
                await answer.send(message)
                if message["type"] != "websocket.http.response.start":
                    over.set()
                    await anyio.sleep_forever()

            scope = {**scope_of(path), "type": "websocket", "scheme": "ws"}
            with anyio.fail_after(10):
                await TapesMiddleware(refuse, registry)(scope, receive, send)

    anyio.run(main)
    assert counts(registry) == {
        ("GET", "<unmatched>", "403"): 1,
        ("GET", "<unmatched>", "401"): 1,
    }
