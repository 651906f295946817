"""tapes.distributed.storage.spool: goodbyes of workers that exited while no aggregator answered."""

from __future__ import annotations

import logging
import os

import pytest

from tapes import forks, processes
from tapes.distributed.protocol.messages import Goodbye, Update
from tapes.distributed.storage import spool
from tapes.distributed.storage.spool import Spool
from tapes.distributed.transport.address import resolve
from tapes.errors import WireError


@pytest.fixture
def endpoints(short_dir):
    return resolve(f"ipc://{short_dir}/m.ipc")


def goodbye():
    update = Update(os.urandom(16), forks.this_process(), processes.host_id(), 1, 0, [], {})
    return Goodbye(0, update)


def test_the_aggregator_reads_each_goodbye_once(endpoints, short_dir):
    """Goodbyes that workers write are drained in one pass, and their files are removed."""
    written = [goodbye() for _ in range(3)]
    spool.write_all(endpoints, written)
    reader = Spool(endpoints)
    drained = [message.update.identity for message, _ in reader.drain()]
    assert sorted(drained) == sorted(one.update.identity for one in written)
    assert list(reader.drain()) == []
    assert list(short_dir.iterdir()) == []


def test_a_goodbye_that_is_written_after_a_pass_is_in_the_next_one(endpoints):
    """A change within one clock tick of the file system is found: the directory's time may stay the same."""
    reader = Spool(endpoints)
    for _ in range(20):
        assert spool.write(endpoints, goodbye())
        assert len(list(reader.drain())) == 1


def test_a_goodbye_that_was_acknowledged_is_discarded(endpoints, short_dir):
    """discard() removes the file of one goodbye, and does nothing where there is none."""
    one = goodbye()
    assert spool.write(endpoints, one)
    spool.discard(endpoints, one)
    spool.discard(endpoints, one)
    assert list(short_dir.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_file_that_is_no_goodbye_is_an_error_and_removed(endpoints, short_dir, content):
    """A damaged file yields a WireError with its bytes, once."""
    (short_dir / f"m.ipc{spool.SUFFIX}00").write_bytes(content)
    ((error, data),) = Spool(endpoints).drain()
    assert isinstance(error, WireError)
    assert data == content
    assert list(short_dir.iterdir()) == []


def test_counts_that_no_file_can_hold_are_logged_as_lost(short_dir, caplog):
    """One line of log says that counts were lost and why; nothing is raised."""
    with caplog.at_level(logging.WARNING):
        spool.write_all(resolve(f"ipc://{short_dir}/missing/m.ipc"), [goodbye(), goodbye()])
        spool.write_all(resolve("tcp://127.0.0.1:5555"), [goodbye()])
    assert len(caplog.messages) == 2
    assert all("lost what this process recorded" in message for message in caplog.messages)
