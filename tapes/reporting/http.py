"""Metrics over HTTP, for applications without a web server."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections import deque
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from tapes import forks, processes
from tapes.clock import monotonic
from tapes.errors import AddressError, AddressInUse, InvalidArgument
from tapes.exposition.endpoint import answer, refusal
from tapes.registry import Registry
from tapes.reporting.base import Reporter

__all__ = ["HTTPReporter"]

_PATHS = frozenset({"", "/", "/metrics", "/metrics/"})
_CLIENT_TIMEOUT_SECONDS = 10.0
"""Maximum seconds for a client to send a request, and to take the answer."""
_HURRY_SECONDS = 1.0
"""The same for the request while the maximum of clients is connected."""
_MAX_CLIENTS = 64
"""Maximum clients that are answered at once, each by a thread."""
_MAX_REFUSED = 256
"""Maximum connections that stay open after a refusal."""
_CLOSE_SECONDS = 1.0
"""Maximum seconds for a refused client to close its connection."""
_LOOK_SECONDS = 0.1
"""Seconds between two looks for clients that have taken too long."""
_REFUSAL_BODY = b"There are too many readers. Ask again in a second.\n"
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nServer: tapes\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Cache-Control: no-store\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_REFUSAL_BODY), _REFUSAL_BODY)
)
_MAX_OF_HEAD = 65536  # maximum bytes of all header lines of a request

_log = logging.getLogger("tapes.reporting.http")


class HTTPReporter(Reporter):
    """Answers ``GET /`` and ``GET /metrics`` with all values, as JSON or in the format that the client wants.

    For web applications, prefer the adapters of `tapes.contrib`. It listens on loopback by default. If
    ``TAPES_METRICS_TOKEN`` is set, clients must send it (``Authorization: Bearer TOKEN``).

    Args:
        port: The TCP port; with 0 the system chooses one, see the attribute ``port`` after `start`.
        registry: What to report; the default registry if ``None``.
        host: The address to listen on.
    """

    def __init__(self, port: int, registry: Registry | None = None, *, host: str = "127.0.0.1") -> None:
        super().__init__(registry=registry)
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise InvalidArgument("a TCP port", got=port, expected="a whole number from 0 to 65535")
        if not isinstance(host, str) or not host or "/" in host:
            raise InvalidArgument("a host", got=host, expected="an address or a name, such as '127.0.0.1'")
        self.port, self.host = port, host
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen in a daemon thread, and answer each client in another one.

        A forked child does not listen: the port stays with the process that started it.

        Raises:
            InvalidArgument: If it was started already.
            AddressInUse: If another process listens on the port.
            AddressError: If the address can't be bound for another reason.
        """
        forks.detect_fork()
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
                remedy="choose another port, or stop the process that listens there"
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
        forks.register_user(server)

    def stop(self) -> None:
        """Stop listening; does nothing if it was not started."""
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
    """Has a thread for each client, for a bounded number of them and a bounded time."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, reporter: HTTPReporter) -> None:
        self.reporter = reporter
        self.is_open = True
        self.waiting: dict[socket.socket, float] = {}  # clients without a complete request, and since when
        self._clients: set[socket.socket] = set()
        self._refused: deque[tuple[socket.socket, float]] = deque()
        self._looked = 0.0
        self.address_family = socket.AF_INET6 if ":" in reporter.host else socket.AF_INET
        super().__init__((reporter.host, reporter.port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        _log.debug("tapes: a request from %s failed", client_address, exc_info=True)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._clients) >= _MAX_CLIENTS:
            self._refuse(request)
            return
        self._clients.add(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._clients.discard(request)
            self._refuse(request)

    def shutdown_request(self, request: Any) -> None:
        self._clients.discard(request)
        self.waiting.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close connections that have taken too long; called for each client, and ten times a second."""
        now = monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        patience = _CLIENT_TIMEOUT_SECONDS if len(self._clients) < _MAX_CLIENTS else _HURRY_SECONDS
        for client, since in list(self.waiting.items()):
            if now - since > patience:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)  # its thread closes it
        for _ in range(len(self._refused)):
            client, since = self._refused.popleft()
            if now - since > _CLOSE_SECONDS or _has_closed(client):
                client.close()
            else:
                self._refused.append((client, since))

    def _refuse(self, client: socket.socket) -> None:
        """Send a 503, and close the connection later: closing it with an unread request loses the answer."""
        with contextlib.suppress(OSError):
            client.setblocking(False)
            client.send(_REFUSAL)
            client.shutdown(socket.SHUT_WR)
        self._refused.append((client, monotonic()))
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popleft()[0].close()

    def server_close(self) -> None:
        super().server_close()
        while self._refused:
            self._refused.popleft()[0].close()

    def before_fork(self) -> None:
        pass

    def after_in_parent(self) -> None:
        pass

    def after_in_child(self, parent: processes.Process, version: int) -> None:
        self.after_in_helper()

    def after_in_helper(self) -> None:
        """In a forked child, close the port: its clients would get no answer."""
        self.is_open = False
        self.socket.close()


def _has_closed(client: socket.socket) -> bool:
    """Read a piece of what a refused client sends; return whether it has closed its end.

    One piece only: a client that sends without a pause must not hold up the others.
    """
    try:
        return not client.recv(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Head:
    """The head of a request: at most `_MAX_OF_HEAD` bytes; the standard library allows 6 MB."""

    def __init__(self, rfile: Any) -> None:
        self._rfile = rfile
        self._left = _MAX_OF_HEAD

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

    def handle_one_request(self) -> None:
        self.server.waiting[self.connection] = monotonic()
        try:
            super().handle_one_request()
        finally:
            self.server.waiting.pop(self.connection, None)

    def parse_request(self) -> bool:
        """Parse the request's head, if it is not too large; otherwise answer 431."""
        rfile, self.rfile = self.rfile, cast(Any, _Head(self.rfile))
        try:
            return super().parse_request()
        finally:
            self.rfile = rfile
            self.server.waiting.pop(self.connection, None)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # its body is not read
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
