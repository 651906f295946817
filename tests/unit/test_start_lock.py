"""tapes.distributed.storage.start_lock: one process at a time starts an aggregator, or is one that exits."""

from __future__ import annotations

import os
import threading

import pytest

from tapes.distributed.storage import start_lock as module
from tapes.distributed.storage.runtime_directory import User
from tapes.distributed.storage.start_lock import start_lock
from tapes.distributed.transport.address import resolve
from tapes.errors import AddressError, AggregatorUnavailable

OURSELVES = User.ourselves()


@pytest.fixture
def endpoints(short_dir):
    return resolve(f"ipc://{short_dir}/m.ipc")


def test_one_process_holds_the_lock(endpoints):
    """While it is held, a second attempt that does not wait gets ``False``; afterwards the lock is free."""
    with start_lock(endpoints, OURSELVES) as held:
        assert held
        with start_lock(endpoints, OURSELVES, wait=False) as second:
            assert not second
    with start_lock(endpoints, OURSELVES, wait=False) as third:
        assert third


def test_a_process_waits_for_the_lock(endpoints):
    """The block of a second thread begins when that of the first one has ended."""
    order = []

    def second():
        with start_lock(endpoints, OURSELVES):
            order.append("second")

    with start_lock(endpoints, OURSELVES):
        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_lock_that_is_never_released_is_an_error(endpoints, monkeypatch):
    """After 20 s the error names the file of the lock."""
    monkeypatch.setattr(module, "_MAX_WAIT_SECONDS", 0.0)
    with (
        start_lock(endpoints, OURSELVES),
        pytest.raises(AggregatorUnavailable, match=r"has not finished .*m\.ipc\.start open"),
        start_lock(endpoints, OURSELVES),
    ):
        pass


def test_a_lock_whose_file_was_removed_is_taken_again(endpoints):
    """An aggregator that exits removes the file while it holds the lock; the next holder has a new file."""
    with start_lock(endpoints, OURSELVES):
        os.unlink(endpoints.path + ".start")
        with start_lock(endpoints, OURSELVES, wait=False) as held:
            assert held
            assert os.path.exists(endpoints.path + ".start")


def test_an_error_in_the_block_is_not_taken_for_a_lock_in_use(endpoints):
    """A BlockingIOError of the caller leaves the block as it is, and the lock is released."""
    with pytest.raises(BlockingIOError), start_lock(endpoints, OURSELVES):
        raise BlockingIOError
    with start_lock(endpoints, OURSELVES, wait=False) as held:
        assert held


def test_a_missing_directory_is_an_error(short_dir):
    """An address in a directory that does not exist raises; there is no lock to wait for."""
    lock = start_lock(resolve(f"ipc://{short_dir}/missing/m.ipc"), OURSELVES)
    with pytest.raises(AddressError, match="there is no directory"), lock:
        pass
