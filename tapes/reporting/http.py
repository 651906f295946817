"""Metrics over HTTP, for applications that have no HTTP of their own."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tapes import forks
from tapes.errors import AddressError, AddressInUse, InvalidArgument
from tapes.exposition.endpoint import Answer, answer, refusal
from tapes.registry import Registry
from tapes.reporting.base import Reporter

__all__ = ["HTTPReporter"]

_PATHS = frozenset({"", "/", "/metrics", "/metrics/"})
_CLIENT_TIMEOUT_SECONDS = 10.0

_log = logging.getLogger("tapes.reporting.http")


class HTTPReporter(Reporter):
    """Answers ``GET /`` and ``GET /metrics`` with all values, as JSON or whatever the client asks for.

    For web applications, prefer the adapters of `tapes.contrib`. Listens on loopback unless told otherwise;
    if ``TAPES_METRICS_TOKEN`` is set, readers have to show it (``Authorization: Bearer TOKEN``).

    Args:
        port: The TCP port; 0 takes a free one, see the attribute ``port`` after `start`.
        registry: What to report; the default registry if ``None``.
        host: The address to listen on.
    """

    def __init__(self, port: int, registry: Registry | None = None, *, host: str = "127.0.0.1") -> None:
        super().__init__(registry=registry)
        if not isinstance(port, int) or not 0 <= port <= 65535:
            raise InvalidArgument("a TCP port", got=port, expected="a whole number from 0 to 65535")
        self.port = port
        self.host = host
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen, and answer from a daemon thread, and another one for each client.

        A forked child does not listen: the port stays with the process that started it.

        Raises:
            InvalidArgument: If it was started already.
            AddressInUse: If something else listens on the port.
            AddressError: If the address can't be bound for another reason.
        """
        forks.check()
        if self._server is not None:
            raise InvalidArgument(
                "HTTPReporter.start() was called before", expected="one start() for each stop()"
            )
        try:
            self._server = _server(self.host, self.port, self)
        except OSError as error:
            kind = AddressInUse if error.errno == errno.EADDRINUSE else AddressError
            raise kind(
                f"HTTPReporter can't listen on {self.host}:{self.port} ({error.strerror or error})",
                remedy="choose another port, or stop what listens there"
                if kind is AddressInUse
                else "choose a host of this machine and a port that this user may use",
            ) from None
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="tapes-http", daemon=True
        )
        self._thread.start()
        forks.add_user(self)

    def stop(self) -> None:
        """Stop listening; nothing if it wasn't started."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = self._thread = None

    def forked(self, parent: forks.Process, version: int) -> None:
        """Called in a forked child: let go of the port, which clients would wait at in vain."""
        if self._server is not None:
            self._server.socket.close()
        self._server = self._thread = None


def _server(host: str, port: int, reporter: HTTPReporter) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    class Handler(_Handler):
        def answer(self, accept: str, query: str) -> Answer:
            return answer(reporter.registry, accept, query)

    return Server((host, port), Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "tapes"
    sys_version = ""
    timeout = _CLIENT_TIMEOUT_SECONDS
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(message)s.\n"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path not in _PATHS:
            status, headers = 404, {"Content-Type": "text/plain; charset=utf-8"}
            body = b"There is nothing here. The metrics are at /metrics.\n"
        else:
            refused = refusal(self.command, self.headers.get("Authorization", ""))
            status, headers, body = refused or self.answer(self.headers.get("Accept", ""), url.query)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the base class's spelling

    def do_POST(self) -> None:
        self.close_connection = True  # what it sends is not read
        self.do_GET()

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST  # noqa: N815

    def answer(self, accept: str, query: str) -> Answer:
        raise NotImplementedError

    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)
