"""tapes.distributed.transport.address: which addresses are allowed, and which endpoints they name."""

from __future__ import annotations

import os

import pytest

from tapes.distributed.transport.address import DEFAULT_ADDR, resolve
from tapes.errors import AddressError


@pytest.mark.parametrize(
    "addr", ["", "x", "ipc://", "inproc://x", "http://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:x",
             "tcp://127.0.0.1:65535", "tcp://127.0.0.1:²", "tcp://0.0.0.0:5000", "tcp://*:5000", "tcp://10.0.0.1:5000"],
)  # fmt: skip
def test_the_error_for_a_bad_address_has_what_was_expected(addr, monkeypatch):
    """An address without scheme or port, or of another machine, is an error that shows an allowed address."""
    monkeypatch.setenv("TAPES_ADDR", addr)
    monkeypatch.delenv("TAPES_CURVE_KEY", raising=False)
    with pytest.raises(AddressError, match="expected"):
        resolve(addr or "ipc://")


BEYOND = (
    "192.0.2.1", "[2001:db8::1]", "[::ffff:192.0.2.1]", "metrics.example", "a-host", "127.0.0.1.example",
)  # fmt: skip


@pytest.mark.parametrize("host", BEYOND)
def test_an_address_of_another_machine_needs_a_key(host, monkeypatch):
    """The error explains how to make a key. The file is read later, by connect and bind."""
    monkeypatch.delenv("TAPES_CURVE_KEY", raising=False)
    with pytest.raises(AddressError, match=r"expected .*TAPES_CURVE_KEY; .*create_certificates"):
        resolve(f"tcp://{host}:5555")
    monkeypatch.setenv("TAPES_CURVE_KEY", "")
    with pytest.raises(AddressError, match="TAPES_CURVE_KEY"):
        resolve(f"tcp://{host}:5555")
    monkeypatch.setenv("TAPES_CURVE_KEY", "/nowhere/key")
    endpoints = resolve(f"tcp://{host}:5555")
    assert endpoints[:3] == (f"tcp://{host}:5555", f"tcp://{host}:5556", None)
    assert endpoints.key.path == "/nowhere/key"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "[::1]", "localhost"])
def test_a_loopback_address_uses_a_configured_key(host, monkeypatch):
    """A loopback address needs no key, and uses one if TAPES_CURVE_KEY is set."""
    monkeypatch.delenv("TAPES_CURVE_KEY", raising=False)
    assert resolve(f"tcp://{host}:5555").key is None
    monkeypatch.setenv("TAPES_CURVE_KEY", "/nowhere/key")
    assert resolve(f"tcp://{host}:5555").key is not None
    assert resolve("ipc://m.ipc").key is None


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "[::0]", "[::ffff:0.0.0.0]"])
def test_a_wildcard_is_refused_with_a_key_too(host, monkeypatch):
    """A wildcard address is an error even with a key: workers can't connect to it."""
    monkeypatch.setenv("TAPES_CURVE_KEY", "/nowhere/key")
    with pytest.raises(AddressError, match=r"wildcard: got .*, expected an address that workers can reach"):
        resolve(f"tcp://{host}:5555")


@pytest.mark.parametrize(
    "host", ["", "::1", "2001:db8::1", "[::1", "[x]", "a b", "127.0.0.1;192.0.2.1", "0", "127.1", "0x7f.1",
             "0X0", "a.0x0", "256.0.0.1", "::", "é"],
)  # fmt: skip
def test_an_invalid_host_is_refused_with_a_key_too(host, monkeypatch):
    """IPv6 addresses without brackets are errors, and so are numbers that only resolvers accept."""
    monkeypatch.setenv("TAPES_CURVE_KEY", "/nowhere/key")
    with pytest.raises(AddressError, match=r"host can't be used: got .*, expected .*brackets"):
        resolve(f"tcp://{host}:5555")


def test_a_very_long_port_is_refused():
    """A port of a thousand digits is an AddressError like any other bad port."""
    with pytest.raises(AddressError, match="65534"):
        resolve("tcp://127.0.0.1:" + "9" * 5000)


def test_a_relative_path_is_made_absolute_once(short_dir, monkeypatch):
    """A relative path is resolved when the address is; a later chdir changes nothing."""
    monkeypatch.chdir(short_dir)
    monkeypatch.delenv("TAPES_ADDR", raising=False)
    assert resolve(DEFAULT_ADDR).path == str(short_dir / "tapes_metrics.ipc")


def test_the_environment_replaces_the_default_only(monkeypatch):
    """TAPES_ADDR replaces the default, but not an equal address that a caller passes."""
    monkeypatch.setenv("TAPES_ADDR", "ipc:///tmp/x.ipc")
    assert resolve(DEFAULT_ADDR).path == resolve(None).path == "/tmp/x.ipc"
    assert resolve("ipc:///tmp/y.ipc").path == "/tmp/y.ipc"
    assert resolve("".join(["ipc://tapes_", "metrics.ipc"])).path == os.path.abspath("tapes_metrics.ipc")


def test_a_path_that_is_too_long_is_an_error_with_the_limit():
    """A path that the kernel would truncate is an error that contains the limit."""
    with pytest.raises(AddressError, match="at most 107"):
        resolve("ipc:///" + "x" * 120)


def test_an_address_that_is_not_a_string_is_an_address_error(short_dir):
    """An address that is not a string is an AddressError, not an AttributeError."""
    with pytest.raises(AddressError, match="5"):
        resolve(5)
