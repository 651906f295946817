"""Reporters that environment variables configure, as ``tapes run`` does."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tapes.errors import InvalidArgument
from tapes.reporting.base import Reporter
from tapes.reporting.http import HTTPReporter
from tapes.reporting.statsd import StatsdReporter

HTTP, STATSD = "TAPES_HTTP", "TAPES_STATSD"

_STATSD_FORM = "[tcp://]HOST[:PORT] or unix:///PATH, and after a ? any of prefix=, interval=SECONDS, tags=1"


def reporters_from(environment: Mapping[str, str]) -> list[Reporter]:
    """Return the reporters of ``TAPES_HTTP`` and ``TAPES_STATSD``; raises `InvalidArgument` for a bad one."""
    makers = {HTTP: _http, STATSD: _statsd}
    return [make(environment[name]) for name, make in makers.items() if environment.get(name)]


def _http(address: str) -> Reporter:
    """Return the reporter of ``[HOST:]PORT``."""
    host, _, port = address.rpartition(":")
    try:
        if not (port.isascii() and port.isdigit()):
            raise ValueError("no port")
        return HTTPReporter(int(port), host=host.strip("[]") or "127.0.0.1")
    except ValueError:
        raise InvalidArgument(HTTP, got=address, expected="PORT or HOST:PORT") from None


def _statsd(address: str) -> Reporter:
    """Return the reporter of an address such as `_STATSD_FORM`."""
    try:
        url = urlsplit(address if "://" in address else f"udp://{address}")
        options = parse_qs(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
        interval = timedelta(seconds=float(options.pop("interval", ["10"])[-1]))
        tags = {"1": True, "0": False}[options.pop("tags", ["0"])[-1]]
        prefix = options.pop("prefix", [""])[-1] or None
        if options or url.fragment or url.username is not None:
            raise ValueError(f"unknown options {sorted(options)}")
        target: dict[str, Any]
        if url.scheme == "unix" and url.path and not url.netloc:
            target = {"host": f"unix://{unquote(url.path)}"}
        elif url.scheme in ("udp", "tcp") and url.hostname and url.path in ("", "/"):
            port = 8125 if url.port is None else url.port
            target = {"host": url.hostname, "port": port, "protocol": url.scheme}
        else:
            raise ValueError("no such address")
        return StatsdReporter(interval, prefix=prefix, tags=tags, **target)
    except (ValueError, KeyError, OverflowError):  # our own errors are among these
        raise InvalidArgument(STATSD, got=address, expected=_STATSD_FORM) from None
