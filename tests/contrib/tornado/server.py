"""A real server of Tornado in the process of a test, and its clients."""

from __future__ import annotations

import asyncio
import time

from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port


async def until(condition, what):
    """Let the event loop run until a condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.002)


class Client:
    """A client of a server under test."""

    def __init__(self, port):
        self.port = port
        self._client = AsyncHTTPClient(force_instance=True)

    async def fetch(self, path, method="GET", **options):
        return await self._client.fetch(
            f"http://127.0.0.1:{self.port}{path}", method=method, raise_error=False,
            allow_nonstandard_methods=True, follow_redirects=False, **options,
        )  # fmt: skip

    async def connect(self, request):
        """Send bytes on a new connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        await writer.drain()
        return reader, writer

    async def raw(self, request):
        """Send bytes and return all that the server answers until it closes."""
        reader, writer = await self.connect(request)
        answer = await reader.read()
        writer.close()
        return answer


def serving(application, scenario, **options):
    """Run a scenario against a real server."""

    async def main():
        sock, port = bind_unused_port()
        server = HTTPServer(application, **options)
        server.add_sockets([sock])
        client = Client(port)
        try:
            await asyncio.wait_for(scenario(client), 20)
        finally:
            client._client.close()
            server.stop()
            await server.close_all_connections()

    asyncio.run(main())


def fetching(application, *requests, **options):
    """Send requests, one after the other; return the answers."""
    answers = []

    async def scenario(client):
        for method, path in requests:
            answers.append(await client.fetch(path, method))

    serving(application, scenario, **options)
    return answers
