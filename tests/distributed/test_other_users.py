"""A service starts, counts and restarts on a machine with a hostile user.

Like every user, the hostile one knows the pid and the start time of the service's supervisor.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import time

import pytest

from tapes import processes
from tapes.distributed.storage.locks import Lock, is_served, needs_restart
from tapes.distributed.transport.address import resolve
from tapes.errors import AddressError
from tapes.processes import lives
from tests.crew import stopped
from tests.distributed.test_places import Service, aggregators, agree
from tests.processes import Home, python_for_any_user, wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two other users")

VICTIM, HOSTILE = 12345, 12346

SHARED = ("/tmp", "/dev/shm")


def hostile(program: str, *arguments: str) -> None:
    """Run a shell program as the hostile user."""
    subprocess.run(
        ["sh", "-ec", program, "sh", *arguments],
        check=True, user=HOSTILE, group=HOSTILE, extra_groups=[], cwd="/", umask=0,
    )  # fmt: skip


@pytest.fixture
def shared(short_dir):
    """A directory where every user can create files, like /tmp."""
    place = short_dir / "tmp"
    place.mkdir()
    place.chmod(0o1777)
    short_dir.chmod(0o777)
    return place


@pytest.fixture
def started(short_dir, shared):
    """Return a function that starts the victim's service, which meets in the shared directory."""
    python, path = python_for_any_user("zmq", "msgpack", "addict")
    services = []

    def start(**environment: str) -> Service:
        home = Home(short_dir)
        given = {"TMPDIR": str(shared), "XDG_RUNTIME_DIR": "", "PYTHONPATH": path, **environment}
        services.append(Service(home, python=python, user=VICTIM, **given))
        return services[-1]

    try:
        yield start
    except BaseException:
        print(*(service.log[-4000:] for service in services), sep="\n")
        raise
    finally:
        for service in services:
            service.close()


def kill_aggregator(path: pathlib.Path) -> None:
    """Kill the aggregator whose socket is at ``path``, and wait for its end."""
    pid = int((path.parent / (path.name + ".lock")).read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not lives(processes.Process(pid, 0)), "the aggregator is dead")


def path_of(address: str) -> pathlib.Path:
    """Return the path of a socket that belongs only to the victim."""
    path = pathlib.Path(address.partition("://")[2])
    assert path.lstat().st_uid == VICTIM
    return path


TAKEN = {
    "a directory": 'mkdir -m 700 "$1"',
    "a directory for all": 'mkdir -m 777 "$1"; : > "$1/metrics.ipc.start"; mkfifo "$1/metrics.ipc.lock"',
    "a link": 'ln -s "$2" "$1"',
    "a file": ': > "$1"',
    "a fifo": 'mkfifo -m 666 "$1"',
}
"""What the hostile user puts where the service may meet; the second argument is a directory of the victim."""


@pytest.mark.parametrize("how", TAKEN)
def test_names_that_another_user_has_taken_are_ignored(started, shared, short_dir, how):
    """A service starts, and its workers meet, although another user has taken all guessable names."""
    private = short_dir / "private"
    private.mkdir(mode=0o700)
    os.chown(private, VICTIM, VICTIM)
    service = started()
    name = "tapes-{}-{}".format(*processes.process_of(service.pid))
    taken = [
        pathlib.Path(parent, name + end)
        for parent in (shared, *SHARED) for end in ("", "-0123456789ab", "-000000000000")
    ]  # fmt: skip
    try:
        for path in taken:
            hostile(TAKEN[how], str(path), str(private))
        first, second = service.worker(), service.worker()
        address = first("join")
        assert second("join") == address
        path = path_of(address)
        assert path.parent.parent == shared
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for worker in (first, second):
            worker("count", 10)
        agree(20, first, second)
        kill_aggregator(path)
        first("count", 1)
        agree(21, first, second)
        third = service.worker()
        assert third("join") == address
        agree(21, first, second, third)
        assert aggregators(service) == 2
        assert list(private.iterdir()) == []
    finally:
        for path in taken:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_name_that_another_user_takes_after_its_directory_was_removed(started, shared):
    """If another user takes the name of a removed directory, the service moves and keeps counting."""
    service = started()
    first, second = service.worker(), service.worker()
    path = path_of(first("join"))
    second("join")
    for worker in (first, second):
        worker("count", 10)
    agree(20, first, second)
    aggregator = int((path.parent / "metrics.ipc.lock").read_text().split()[0])
    with stopped(aggregator):
        shutil.rmtree(path.parent)
        hostile(TAKEN["a directory for all"], str(path.parent))
    first("count", 1)
    agree(21, first, second)
    third = service.worker()
    assert path_of(third("join")).parent.parent != shared
    third("count", 1)
    agree(22, first, second, third)
    assert aggregators(service) == 1
    shutil.rmtree(path.parent)


BESIDE = """
for end in start journal journal.draft journal.2 journal.tail-00000000000000000001 spool-0123 probe; do
    case $2 in
        files) [ -e "$1.$end" ] || echo precious > "$1.$end";;
        links) [ -e "$1.$end" ] || ln -s /etc/passwd "$1.$end";;
        fifos) [ -e "$1.$end" ] || mkfifo -m 666 "$1.$end";;
    esac
done
"""


@pytest.mark.parametrize("when", ["before the start", "before a kill"])
@pytest.mark.parametrize("what", ["files", "links", "fifos"])
def test_files_of_another_user_beside_an_address_are_ignored(started, shared, what, when):
    """The aggregator starts and restarts beside another user's files, and has every count."""
    address = shared / "m.ipc"
    if when == "before the start":
        hostile(BESIDE, str(address), what)
    service = started(TAPES_ADDR=f"ipc://{address}")
    first, second = service.worker(), service.worker()
    for worker in (first, second):
        worker("join")
        worker("count", 10)
    agree(20, first, second)
    second("end")  # what it counted is in the journal alone
    agree(20, first)
    if when == "before a kill":
        for end in ("start", "journal"):  # as by a cleaner
            pathlib.Path(f"{address}.{end}").unlink()
        hostile(BESIDE, str(address), what)
    for turn in range(2):
        first("count", 1)
        agree(21 + turn, first)
        written = time.time()
        wait_for(
            lambda since=written: any(
                path.lstat().st_uid == VICTIM and path.lstat().st_mtime >= since
                for path in shared.glob("m.ipc.journal*")
            ),
            "the journal is written",
        )
        kill_aggregator(address)
        agree(21 + turn, first)
    third = service.worker()
    third("join")
    agree(22, first, third)
    if what == "files":
        assert pathlib.Path(f"{address}.journal.2").read_text() == "precious\n"


@pytest.mark.parametrize("end", ["lock", "read", ""])
def test_an_address_that_another_user_has_taken_is_an_error_at_once(started, shared, end):
    """An explicit address that another user has taken is an error at once; it says what to choose."""
    address = shared / "m.ipc"
    hostile('mkfifo -m 666 "$1"', f"{address}.{end}".rstrip("."))
    worker = started(TAPES_ADDR=f"ipc://{address}").worker()
    began = time.monotonic()
    answer = worker("join")
    assert answer.startswith("AddressError("), answer
    assert time.monotonic() - began < 15


def test_a_fifo_in_place_of_a_lock_blocks_no_process(short_dir):
    """A FIFO with the name of the lock does not block: opening one for reading waits for a writer."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    os.mkfifo(endpoints.lock)
    assert not is_served(endpoints)
    assert not needs_restart(endpoints)
    with pytest.raises(AddressError):
        Lock(endpoints).acquire()


def test_a_worker_does_not_connect_to_another_users_socket(started, shared):
    """If another user serves the place that TAPES_ADDR names, a worker starts an aggregator elsewhere."""
    service = started()
    name = "tapes-{}-{}".format(*processes.process_of(service.pid))
    given = shared / name / "metrics.ipc"
    hostile('mkdir -m 777 "$1"; echo 1 > "$1/metrics.ipc.lock"', str(given.parent))
    with socket.socket(socket.AF_UNIX) as trap:
        trap.bind(str(given))
        given.chmod(0o777)
        os.chown(given, HOSTILE, HOSTILE)
        trap.listen()
        trap.settimeout(0)
        worker = service.worker()
        worker("environment", {"TAPES_ADDR": f"ipc://{given}"})
        assert path_of(worker("join")) != given
        worker("count", 1)
        agree(1, worker)
        with pytest.raises(BlockingIOError):
            trap.accept()
