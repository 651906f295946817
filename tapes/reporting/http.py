"""Metrics over HTTP, for applications that have no HTTP of their own."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from tapes import forks
from tapes.errors import AddressError, AddressInUse, InvalidArgument
from tapes.exposition.endpoint import answer, refusal
from tapes.registry import Registry
from tapes.reporting.base import Reporter

__all__ = ["HTTPReporter"]

_PATHS = frozenset({"", "/", "/metrics", "/metrics/"})
_CLIENT_TIMEOUT_SECONDS = 10.0
_MOST_OF_HEAD = 65536  # maximum bytes of all header lines of a request

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
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise InvalidArgument("a TCP port", got=port, expected="a whole number from 0 to 65535")
        if not isinstance(host, str) or not host or "/" in host:
            raise InvalidArgument("a host", got=host, expected="an address or a name, such as '127.0.0.1'")
        self.port = port
        self.host = host
        self._server: _Server | None = None
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
        if self._server is not None and self._server.is_open:
            raise InvalidArgument(
                "HTTPReporter.start() was called before", expected="one start() for each stop()"
            )
        try:
            server = _Server(self)
        except OSError as error:
            kind = AddressInUse if error.errno == errno.EADDRINUSE else AddressError
            raise kind(
                f"HTTPReporter can't listen on {self.host}:{self.port} ({error.strerror or error})",
                remedy="choose another port, or stop what listens there"
                if kind is AddressInUse
                else "choose a host of this machine and a port that this user may use",
            ) from None
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="tapes-http", daemon=True)
        try:
            thread.start()
        except BaseException:
            server.server_close()
            raise
        self.port = server.server_address[1]
        self._server, self._thread = server, thread
        forks.add_user(server)

    def stop(self) -> None:
        """Stop listening; nothing if it wasn't started."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is not None and thread is not None and server.is_open:
            server.shutdown()
            server.server_close()
            thread.join()

    def pause(self) -> None:
        """Stop listening, so that another process can listen on the port."""
        self.stop()

    def resume(self) -> None:
        """Listen again, on the same port; raises as `start`."""
        self.start()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reporter: HTTPReporter) -> None:
        self.reporter = reporter
        self.is_open = True
        self.address_family = socket.AF_INET6 if ":" in reporter.host else socket.AF_INET
        super().__init__((reporter.host, reporter.port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Note that a client was cut off, or cut us off."""
        _log.debug("tapes: a request from %s failed", client_address, exc_info=True)

    def before_fork(self) -> None:
        """Called before this process forks."""

    def go_on(self) -> None:
        """Called in the parent after a fork."""

    def forked(self, parent: forks.Process, version: int) -> None:
        """Called in a forked child."""
        self.let_go()

    def let_go(self) -> None:
        """In a forked child, let go of the port, at which clients would wait in vain."""
        self.is_open = False
        self.socket.close()


class _Head:
    """The head of a request: at most `_MOST_OF_HEAD` bytes, where the standard library allows 6 MB."""

    def __init__(self, rfile: Any) -> None:
        self._rfile = rfile
        self._left = _MOST_OF_HEAD

    def readline(self, limit: int) -> bytes:
        line: bytes = self._rfile.readline(limit)
        self._left -= len(line)
        if self._left < 0:
            raise LineTooLong("head")
        return line


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "tapes"
    sys_version = ""
    timeout = _CLIENT_TIMEOUT_SECONDS
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(message)s.\n"

    def parse_request(self) -> bool:
        """Parse the request's head, if it is not too large; otherwise answer 431."""
        rfile, self.rfile = self.rfile, cast(Any, _Head(self.rfile))
        try:
            return super().parse_request()
        finally:
            self.rfile = rfile

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what it sends is not read
        if path not in _PATHS:
            status, headers = 404, {"Content-Type": "text/plain; charset=utf-8"}
            body = b"There is nothing here. The metrics are at /metrics.\n"
        else:
            refused = refusal(self.command, self.headers.get("Authorization", ""))
            accept = ", ".join(self.headers.get_all("Accept", ()))
            status, headers, body = refused or answer(self.server.reporter.registry, accept, query)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET  # noqa: N815 - their spelling

    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)
