"""Reporters as the environment and the command line name them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tapes.errors import InvalidArgument
from tapes.reporting.configured import reporters_from


@pytest.mark.parametrize(
    ("told", "address", "protocol", "interval", "prefix", "tags"),
    [
        ("localhost", "localhost:8125", False, 10, "", False),
        ("statsd.example:9125", "statsd.example:9125", False, 10, "", False),
        ("udp://10.0.0.1:9125?prefix=shop", "10.0.0.1:9125", False, 10, "shop.", False),
        ("tcp://[::1]:8126/?interval=0.5&tags=1", "::1:8126", True, 0.5, "", True),
        ("unix:///run/dog%20statsd.socket?tags=1", "/run/dog statsd.socket", False, 10, "", True),
    ],
)
def test_statsd_is_named_by_an_address_with_options(told, address, protocol, interval, prefix, tags):
    """A StatsD address can have each option of the reporter that an aggregator needs."""
    (reporter,) = reporters_from({"TAPES_STATSD": told})
    client = reporter.client
    assert client._transport.address == address
    assert client._transport._is_stream == protocol
    assert reporter.interval == timedelta(seconds=interval)
    assert (client._prefix, client._tags) == (prefix, tags)


@pytest.mark.parametrize(
    "told",
    [
        "localhost:eighty", ":8125", "http://localhost", "localhost/path", "localhost?intervall=5",
        "localhost?interval=0", "localhost?interval=nan", "localhost?tags=yes", "localhost:0", "unix://x/y",
        "localhost:70000", "me@localhost", "unix://", "localhost?interval=1e999", "localhost?prefix",
        "local host#x",
    ],
)  # fmt: skip
def test_what_can_not_be_understood_says_how_it_is_spelled(told):
    """A value that can't be parsed raises an error with the value and an example of each form."""
    with pytest.raises(InvalidArgument, match=r"TAPES_STATSD: got .*HOST.*unix:///PATH.*interval=SECONDS"):
        reporters_from({"TAPES_STATSD": told})


def test_http_is_named_by_its_port():
    """TAPES_HTTP is a port on loopback, or a host and a port."""
    for told, host in (("9100", "127.0.0.1"), ("0.0.0.0:9100", "0.0.0.0"), ("[::1]:9100", "::1")):
        (reporter,) = reporters_from({"TAPES_HTTP": told})
        assert (reporter.host, reporter.port) == (host, 9100)


def test_several_at_once_and_none():
    """Several reporters can be configured at once; an empty variable counts as unset."""
    assert len(reporters_from({"TAPES_HTTP": "9100", "TAPES_STATSD": "localhost"})) == 2
    assert reporters_from({"TAPES_HTTP": "", "TAPES_STATSD": ""}) == []
