"""A connection to a receiver of lines, over UDP, TCP or a unix socket.

A datagram counts as sent if the system accepts it and reports no receiver missing (on one host it knows at
once). Of a stream, the lines that the system accepts as a whole count as sent. Everything else raises, and
the next send looks up the address again. A send first notices that the receiver has closed the stream.
"""

from __future__ import annotations

import errno
import os
import socket
import weakref
from collections.abc import Sequence

from tapes import forks
from tapes.clock import monotonic
from tapes.errors import InvalidArgument

PROTOCOLS = ("udp", "tcp")
_UNIX = "unix://"
_TIMEOUT_SECONDS = 1.0
"""Maximum seconds for a connection or a send."""
_LOOK_UP_SECONDS = 60.0
"""Seconds after which an address is looked up again even if nothing fails: lost datagrams raise no error."""
_DATAGRAM_BYTES = 1432
"""Maximum that fits into an Ethernet frame with the headers of IPv6 and UDP, and of a tunnel."""
_UNIX_DATAGRAM_BYTES = 8192
_STREAM_BYTES = 1 << 16
_MAX_READS = 16
"""Maximum reads of 4 KB before each packet, which discard what a receiver has sent."""

_transports: weakref.WeakSet[Transport] = weakref.WeakSet()


def _close_inherited() -> None:
    """In a forked child, close the parent's connections before their descriptors are used for others."""
    for transport in list(_transports):
        transport.close()


forks.renew_in_child(_close_inherited)


class Transport:
    """Sends lines to ``host``: a name, an address, or ``unix:///PATH``, for which it ignores the port.

    For a unix socket, the protocol ``"udp"`` means datagrams, and ``"tcp"`` a stream.
    """

    def __init__(self, host: str, port: int, protocol: str) -> None:
        if not isinstance(host, str) or not host:
            raise InvalidArgument("a host", got=host, expected="a name, an address, or unix:///PATH")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port <= 65535:
            raise InvalidArgument("a port", got=port, expected="a whole number from 1 to 65535")
        if protocol not in PROTOCOLS:
            raise InvalidArgument("a protocol", got=protocol, expected=" or ".join(PROTOCOLS))
        self._path = host[len(_UNIX) :] if host.startswith(_UNIX) else ""
        self._host, self._port = host, port
        self._is_stream = protocol == "tcp"
        self._socket: socket.socket | None = None
        self._opened, self._turn = 0.0, 0
        self.address = self._path or f"{host}:{port}"
        _transports.add(self)

    @property
    def max_bytes(self) -> int:
        return _STREAM_BYTES if self._is_stream else _UNIX_DATAGRAM_BYTES if self._path else _DATAGRAM_BYTES

    def send(self, lines: Sequence[bytes]) -> int:
        """Send one packet of ``lines``; return the number of lines sent, all unless the stream broke.

        Raises `OSError` if none was sent.
        """
        try:
            connection = self._open()
            if self._is_stream:
                return self._write(connection, lines)
            connection.send(b"\n".join(lines))
            error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            return len(lines)
        except OSError as error:
            self.close()
            self._turn += not isinstance(error, socket.gaierror)
            raise

    def close(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def __del__(self) -> None:
        if getattr(self, "_socket", None) is not None:  # else its arguments were refused
            self.close()

    def _open(self) -> socket.socket:
        """Return the open connection, or a new one if there is none or it is stale."""
        if self._socket is not None and self._is_stale(self._socket):
            self.close()
        if self._socket is None:
            self._socket = self._connected()
            self._opened = monotonic()
        return self._socket

    def _is_stale(self, connection: socket.socket) -> bool:
        if not self._is_stream:
            if monotonic() - self._opened <= _LOOK_UP_SECONDS:
                return False
            self._turn = 0
            return True
        connection.setblocking(False)
        try:  # only an end of the stream matters, not what the receiver has sent
            return not all(connection.recv(4096) for _ in range(_MAX_READS))
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            connection.settimeout(_TIMEOUT_SECONDS)

    def _connected(self) -> socket.socket:
        kind = socket.SOCK_STREAM if self._is_stream else socket.SOCK_DGRAM
        if self._path:
            return _connected(socket.AF_UNIX, kind, self._path)
        found = socket.getaddrinfo(self._host, self._port, type=kind)
        found.sort(key=lambda info: info[0] != socket.AF_INET)  # most receivers listen there alone
        if not self._is_stream:  # only sending shows whether a receiver exists: try another one each time
            family, _, _, _, address = found[self._turn % len(found)]
            return _connected(family, kind, address)
        for family, _, _, _, address in found[:-1]:
            try:
                return _connected(family, kind, address)
            except OSError:
                continue
        return _connected(found[-1][0], kind, found[-1][4])

    def _write(self, connection: socket.socket, lines: Sequence[bytes]) -> int:
        data = b"".join([line + b"\n" for line in lines])
        written = 0
        try:
            while written < len(data):
                written += connection.send(data[written:])
        except OSError:
            whole = _whole_lines(lines, written)
            if not whole:
                raise
            self.close()  # the next line would continue the broken one
            return whole
        return len(lines)


def _whole_lines(lines: Sequence[bytes], written: int) -> int:
    for number, line in enumerate(lines):
        written -= len(line) + 1
        if written < 0:
            return number
    return len(lines)


def _connected(family: int, kind: int, address: object) -> socket.socket:
    connection = socket.socket(family, kind)
    try:
        connection.settimeout(_TIMEOUT_SECONDS)
        connection.connect(address)  # type: ignore[arg-type]  # one of the family
    except OSError as error:
        connection.close()
        if error.errno == errno.EPROTOTYPE:
            raise OSError(error.errno, "the socket is of the other kind: try another protocol") from None
        raise
    return connection
