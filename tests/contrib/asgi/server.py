"""An ASGI server for tests: it sends the messages of one request, and keeps the answer."""

from __future__ import annotations

import anyio

from tapes.session import Session

BACKENDS = ("asyncio", "trio")


class Answer:
    """The messages that a server got from an application."""

    def __init__(self):
        self.messages = []

    async def send(self, message):
        self.messages.append(message)

    def _of(self, kind):
        return [message for message in self.messages if message["type"] == kind]

    @property
    def status(self):
        return self._of("http.response.start")[0]["status"]

    @property
    def headers(self):
        return dict(self._of("http.response.start")[0]["headers"])

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self._of("http.response.body"))


def scope_of(path="/", method="GET", **more):
    path, _, query = path.partition("?")
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": method, "scheme": "http", "path": path, "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "headers": [(b"host", b"shop.example")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), **more,
    }  # fmt: skip


def receiving(*messages):
    """Return a server's receive(): these messages, then none."""
    left = list(messages)

    async def receive():
        if not left:
            await anyio.sleep_forever()
        return left.pop(0)

    return receive


def ask(app, path="/", method="GET", body=b"", backend="asyncio", **scope):
    """Return the answer to one request."""
    answer = Answer()
    receive = receiving({"type": "http.request", "body": body, "more_body": False})
    anyio.run(app, scope_of(path, method, **scope), receive, answer.send, backend=backend)
    return answer


class Connected(Session):
    """A session that is connected to a service."""

    is_connected = True


async def plain(scope, receive, send):
    """Answer ``plain``: the smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"plain"})
