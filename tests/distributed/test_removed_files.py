"""A running aggregator whose files are removed, in any combination, makes them again; counts stay right."""

from __future__ import annotations

import itertools
import os
import pathlib
import signal

import pytest

from tapes.distributed.storage.locks import is_served
from tapes.distributed.transport.address import resolve
from tests.crew import stopped
from tests.distributed.test_places import Service, agree
from tests.processes import Home, wait_for

KINDS = ("", ".read", ".lock", ".journal", ".journal.tail-*")
"""How the names of the files end: both sockets, the lock, the journal, and its tail."""

COMBINATIONS = [few for many in range(1, len(KINDS) + 1) for few in itertools.combinations(KINDS, many)]


@pytest.fixture(params=["a private directory", "an address"])
def service(short_dir, request):
    """A service, and the path of its socket."""
    home = Home(short_dir)
    given = {"TAPES_ADDR": f"ipc://{short_dir}/m.ipc"} if request.param == "an address" else {}
    service = Service(home, **home.environment, **given)
    try:
        yield service
    except BaseException:
        print(service.log[-6000:])
        raise
    finally:
        service.close()


def files(path: str, *kinds: str) -> list[pathlib.Path]:
    """Return the existing files of the aggregator at ``path``."""
    return [
        found for kind in kinds for found in pathlib.Path(path).parent.glob(pathlib.Path(path).name + kind)
    ]


def aggregator(path: str) -> int:
    return int(pathlib.Path(path + ".lock").read_text().split()[0])


def is_whole(path: str) -> bool:
    """Return whether all files exist that a next aggregator and new workers need."""
    return is_served(resolve(f"ipc://{path}")) and len(files(path, *KINDS[:4])) == 4


@pytest.mark.timeout(300)
def test_files_are_removed_in_any_combination(service):
    """Workers that exit or start after any files were removed are counted, also by the next aggregator."""
    first = service.worker()
    path = first("join").partition("://")[2]
    counted = 0
    for number, combination in enumerate(COMBINATIONS):
        leaves = service.worker()
        leaves("join")
        leaves("count", 10)
        with stopped(aggregator(path)):
            for file in files(path, *combination):
                file.unlink()
        leaves("end")
        wait_for(lambda: is_whole(path), f"all files are there again, without {combination}")
        first("count", 1)
        counted += 11
        agree(counted, first)
        if number % 4 == 0:
            killed = aggregator(path)
            first("read")
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda dead=killed: is_whole(path) and aggregator(path) != dead, "there is another one")
            agree(counted, first)


def test_a_journal_tail_is_removed_while_nothing_is_recorded(service):
    """The counts of an exited worker are soon in the journal again, without another event."""
    first, leaves = service.worker(), service.worker()
    path = first("join").partition("://")[2]
    leaves("join")
    leaves("count", 10)
    agree(10, first)
    before = os.stat(path + ".journal").st_ino
    leaves("end")
    wait_for(
        lambda: files(path, KINDS[4]) or os.stat(path + ".journal").st_ino != before, "it is written down"
    )
    for file in files(path, KINDS[3], KINDS[4]):
        file.unlink()
    wait_for(lambda: is_whole(path), "there is a journal", 5)
    os.kill(aggregator(path), signal.SIGKILL)
    agree(10, first)
