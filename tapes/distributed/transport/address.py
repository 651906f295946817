"""Addresses: which are allowed, and which endpoints they name.

An address names two endpoints: one for publications, and one for requests (``….read`` beside an IPC socket,
the next port for TCP). ZeroMQ checks little: it truncates long paths, takes the socket file of a living
server, replaces plain files, and resolves relative paths again after each ``chdir``. The checks are here.

The kernel protects the file of an IPC socket. For TCP see `tapes.distributed.transport.curve`.
"""

from __future__ import annotations

import os
import re
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from tapes.distributed.transport.curve import HOW_TO_MAKE_ONE, KeyFile
from tapes.errors import AddressError


class _DefaultAddress(str):
    """The default; an equal address that a caller passes is of another type."""

    __slots__ = ()


# Means ``TAPES_ADDR`` from the environment; itself if that isn't set.
DEFAULT_ADDR: str = _DefaultAddress("ipc://tapes_metrics.ipc")

_MAX_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Maximum length of a path in ``sockaddr_un``: 108 bytes on Linux, one of them for the final zero."""

_NAME = re.compile(r"(?!(.*\.)?(\d+|0x[\da-f]*)\.?$)[\w.-]+", re.ASCII | re.IGNORECASE)
"""A host name. Resolvers treat a name that ends in a number as an address: ``0`` and ``127.1`` too."""


class Endpoints(NamedTuple):
    """Where an aggregator listens."""

    publish: str  # the endpoint for publications; also the address as a whole
    read: str  # the endpoint for requests
    path: str | None  # the socket's file, if it has one
    key: KeyFile | None = None  # the file of the key that both ends must have

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path, self.path + ".read") if self.path else ()

    @property
    def lock(self) -> str | None:
        """The file that the aggregator locks while it lives, or ``None`` if there is none."""
        return self.path + ".lock" if self.path else None

    def check_key(self) -> None:
        """Read the key file, if there is one; raises AddressError if it can't be used."""
        if self.key is not None:
            _ = self.key.pair


def resolve(addr: str | None) -> Endpoints:
    """Return the endpoints of ``addr``, or raise AddressError.

    ``addr`` is ``ipc://PATH``, or ``tcp://HOST:PORT``, beyond loopback with ``TAPES_CURVE_KEY`` only; or
    `DEFAULT_ADDR` or ``None`` for ``TAPES_ADDR``. A relative path is resolved now, in the working directory.
    """
    if addr is None or addr is DEFAULT_ADDR:
        addr = os.environ.get("TAPES_ADDR") or str(DEFAULT_ADDR)
    scheme, separator, rest = addr.partition("://") if isinstance(addr, str) else ("", "", "")
    if separator and rest and scheme == "ipc":
        return _ipc(addr, rest)
    if separator and rest and scheme == "tcp":
        return _tcp(addr, rest)
    raise AddressError(
        "the aggregator's address can't be used", got=addr, expected="ipc://PATH or tcp://127.0.0.1:PORT",
        remedy="pass another socket_addr, or set TAPES_ADDR",
    )  # fmt: skip


def _ipc(addr: str, path: str) -> Endpoints:
    if path.startswith("@"):
        return Endpoints(addr, addr + ".read", None)
    path = os.path.abspath(path)
    length = len(os.fsencode(path + ".read"))
    if length > _MAX_PATH_BYTES:
        raise AddressError(
            f"the path of an IPC socket has {length} bytes, with '.read'", got=path,
            expected=f"at most {_MAX_PATH_BYTES}", remedy="use a shorter directory",
        )  # fmt: skip
    return Endpoints(f"ipc://{path}", f"ipc://{path}.read", path)


def _tcp(addr: str, rest: str) -> Endpoints:
    host, _, port = rest.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5) or not 0 < int(port) < 65535:
        raise AddressError(
            "the aggregator's port can't be used", got=addr, expected="a number from 1 to 65534"
        )
    ip = _ip(host)
    if host == "*" or (ip is not None and ip.is_unspecified):
        raise AddressError(
            "workers can't connect to a wildcard", got=addr,
            expected="an address that workers can reach, such as tcp://127.0.0.1:PORT",
            remedy="use the address of one of this machine's interfaces",
        )  # fmt: skip
    if ip is None and not _NAME.fullmatch(host):
        raise AddressError(
            "the aggregator's host can't be used", got=addr,
            expected="an IPv4 address, an IPv6 address in brackets, or a host name",
        )  # fmt: skip
    key = KeyFile.from_environment()
    if key is None and not (host == "localhost" if ip is None else ip.is_loopback):
        raise AddressError(
            "without a key the aggregator listens on this machine only", got=addr,
            expected="a loopback address such as tcp://127.0.0.1:PORT, or a key file in TAPES_CURVE_KEY",
            remedy=HOW_TO_MAKE_ONE,
        )  # fmt: skip
    return Endpoints(addr, f"tcp://{host}:{int(port) + 1}", None, key)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    """Return ``host`` as an IP address, if it is one; an IPv4-mapped IPv6 address as the IPv4 address."""
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        ip = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        return None
    if ip.version == 6:
        return (ip.ipv4_mapped or ip) if bracketed else None
    return ip
