"""tapes.distributed.storage.locks: one aggregator for each address."""

from __future__ import annotations

import os
import socket

import pytest

from tapes.distributed.storage.locks import Lock
from tapes.distributed.transport.address import resolve
from tapes.errors import AddressError, AddressInUse


def test_one_aggregator_holds_the_lock(short_dir):
    """A second aggregator gets an error with the pid of the first; a release frees the lock."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    first, second = Lock(endpoints), Lock(endpoints)
    first.acquire()
    with pytest.raises(AddressInUse, match=f"pid {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert list(short_dir.iterdir()) == []


def test_the_socket_of_a_killed_aggregator_is_removed(short_dir):
    """A socket file that no process listens on does not prevent the next aggregator from starting."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(endpoints.path)
    lock = Lock(endpoints)
    lock.acquire()
    assert not os.path.exists(endpoints.path)
    lock.release()


def test_a_file_of_another_program_is_not_taken_for_a_lock(short_dir):
    """A file with the name of the lock and other content is an error, and stays as it is."""
    precious = short_dir / "m.ipc.lock"
    precious.write_text("precious")
    with pytest.raises(AddressError, match="another program's file"):
        Lock(resolve(f"ipc://{short_dir}/m.ipc")).acquire()
    assert precious.read_text() == "precious"


def test_a_file_that_is_not_a_socket_is_not_replaced(short_dir):
    """A regular file at the address is an error, and stays as it is."""
    precious = short_dir / "m.ipc"
    precious.write_text("precious")
    with pytest.raises(AddressError, match="not a socket"):
        Lock(resolve(f"ipc://{precious}")).acquire()
    assert precious.read_text() == "precious"
    assert list(short_dir.iterdir()) == [precious]
