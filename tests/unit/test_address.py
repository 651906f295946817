"""tapes.distributed.transport.address: what may be bound."""

from __future__ import annotations

import os
import socket

import pytest

from tapes.distributed.storage.locks import Lock
from tapes.distributed.transport.address import DEFAULT_ADDR, resolve
from tapes.errors import AddressError, AddressInUse


@pytest.mark.parametrize(
    "addr", ["", "x", "ipc://", "inproc://x", "http://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:x",
             "tcp://127.0.0.1:65535", "tcp://127.0.0.1:²", "tcp://0.0.0.0:5000", "tcp://*:5000", "tcp://10.0.0.1:5000"],
)  # fmt: skip
def test_bad_addresses_are_told_with_what_was_expected(addr, monkeypatch):
    """No scheme, no port, or not this machine."""
    monkeypatch.setenv("TAPES_ADDR", addr)
    monkeypatch.delenv("TAPES_CURVE_KEY", raising=False)
    with pytest.raises(AddressError, match="expected"):
        resolve(addr or "ipc://")


BEYOND = (
    "192.0.2.1", "[2001:db8::1]", "[::ffff:192.0.2.1]", "metrics.example", "a-host", "127.0.0.1.example",
)  # fmt: skip


@pytest.mark.parametrize("host", BEYOND)
def test_beyond_this_machine_a_key_is_needed(host, monkeypatch):
    """The error says how to come by one; the file is read later, by who connects or binds."""
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
def test_on_this_machine_a_key_is_used_if_there_is_one(host, monkeypatch):
    """And not needed."""
    monkeypatch.delenv("TAPES_CURVE_KEY", raising=False)
    assert resolve(f"tcp://{host}:5555").key is None
    monkeypatch.setenv("TAPES_CURVE_KEY", "/nowhere/key")
    assert resolve(f"tcp://{host}:5555").key is not None
    assert resolve("ipc://m.ipc").key is None


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "[::0]", "[::ffff:0.0.0.0]"])
def test_a_wildcard_is_refused_with_a_key_too(host, monkeypatch):
    """Workers can't connect to it."""
    monkeypatch.setenv("TAPES_CURVE_KEY", "/nowhere/key")
    with pytest.raises(AddressError, match=r"wildcard: got .*, expected an address that workers can reach"):
        resolve(f"tcp://{host}:5555")


@pytest.mark.parametrize(
    "host", ["", "::1", "2001:db8::1", "[::1", "[x]", "a b", "127.0.0.1;192.0.2.1", "0", "127.1", "0x7f.1",
             "0X0", "a.0x0", "256.0.0.1", "::", "é"],
)  # fmt: skip
def test_what_is_no_host_is_refused_with_a_key_too(host, monkeypatch):
    """An IPv6 address without brackets, and what only resolvers take for an address."""
    monkeypatch.setenv("TAPES_CURVE_KEY", "/nowhere/key")
    with pytest.raises(AddressError, match=r"host can't be used: got .*, expected .*brackets"):
        resolve(f"tcp://{host}:5555")


def test_a_port_may_be_a_very_long_number():
    """It is refused like any other."""
    with pytest.raises(AddressError, match="65534"):
        resolve("tcp://127.0.0.1:" + "9" * 5000)


def test_a_relative_path_is_made_absolute_once(short_dir, monkeypatch):
    """A later chdir changes nothing."""
    monkeypatch.chdir(short_dir)
    monkeypatch.delenv("TAPES_ADDR", raising=False)
    assert resolve(DEFAULT_ADDR).path == str(short_dir / "tapes_metrics.ipc")


def test_the_environment_replaces_the_default_only(monkeypatch):
    """An explicit address is taken literally, also one that is spelled like the default."""
    monkeypatch.setenv("TAPES_ADDR", "ipc:///tmp/x.ipc")
    assert resolve(DEFAULT_ADDR).path == resolve(None).path == "/tmp/x.ipc"
    assert resolve("ipc:///tmp/y.ipc").path == "/tmp/y.ipc"
    assert resolve("".join(["ipc://tapes_", "metrics.ipc"])).path == os.path.abspath("tapes_metrics.ipc")


def test_too_long_a_path_is_told_with_the_limit():
    """Before the kernel truncates it."""
    with pytest.raises(AddressError, match="at most 107"):
        resolve("ipc:///" + "x" * 120)


def test_a_lock_is_held_by_one(short_dir):
    """The second is told who has it; after a release the next one gets it, and no file stays."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    first, second = Lock(endpoints), Lock(endpoints)
    first.acquire()
    with pytest.raises(AddressInUse, match=f"pid {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert list(short_dir.iterdir()) == []


def test_what_a_killed_aggregator_left_is_cleared(short_dir):
    """A dead socket is replaced."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(endpoints.path)
    lock = Lock(endpoints)
    lock.acquire()
    assert not os.path.exists(endpoints.path)
    lock.release()


def test_an_address_that_is_no_text_is_told(short_dir):
    """Not an AttributeError."""
    with pytest.raises(AddressError, match="5"):
        resolve(5)


def test_a_lock_file_that_is_somebodys_is_left_alone(short_dir):
    """It may be precious too."""
    precious = short_dir / "m.ipc.lock"
    precious.write_text("precious")
    with pytest.raises(AddressError, match="another program's file"):
        Lock(resolve(f"ipc://{short_dir}/m.ipc")).acquire()
    assert precious.read_text() == "precious"


def test_what_is_not_a_socket_is_not_replaced(short_dir):
    """A plain file at the address is somebody's file."""
    precious = short_dir / "m.ipc"
    precious.write_text("precious")
    with pytest.raises(AddressError, match="not a socket"):
        Lock(resolve(f"ipc://{precious}")).acquire()
    assert precious.read_text() == "precious"
    assert list(short_dir.iterdir()) == [precious]
