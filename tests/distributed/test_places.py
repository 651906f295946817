"""All processes of a service choose one place: there is one aggregator, whatever happens to its directory."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.processes import Home, clean_environment, mentions, wait_for

WORKER = """
import json, os, sys, tapes
counter = tapes.counter("n")
for line in sys.stdin:
    command, *arguments = json.loads(line)
    try:
        if command == "join":
            tapes.join()
            answer = os.environ["TAPES_ADDR"]
        elif command == "environment":
            os.environ.update(arguments[0])
            answer = "set"
        elif command == "count":
            counter.increment(arguments[0])
            answer = "counted"
        elif command == "read":
            answer = tapes.get_stats().get("n", {}).get("value", 0)
        elif command == "end":
            sys.exit()
    except tapes.TapesError as error:
        answer = repr(error)
    print(json.dumps(answer), flush=True)
"""

SERVICE = f"""
import os, socket, sys
import tapes
while True:  # a master, which forks a worker for each line
    line = sys.stdin.readline()
    if not line:
        break
    path = line.strip()
    if os.fork() == 0:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        sys.stdin = connection.makefile("r")
        sys.stdout = connection.makefile("w")
        exec({WORKER!r})
        os._exit(0)
"""


class Service:
    """A master whose forked workers execute commands of the test; run as ``user``, if that is given."""

    def __init__(
        self, home: Home, *, python: str = sys.executable, user: int | None = None, **environment: str
    ) -> None:
        self.home = home
        self._log = (home.directory / "errors.log").open("w")
        (home.directory / "service.py").write_text(SERVICE)
        self._master = subprocess.Popen(
            [python, "service.py"], cwd=home.directory, env=clean_environment(**environment),
            stdin=subprocess.PIPE, stderr=self._log, text=True, bufsize=1, start_new_session=True,
            user=user, group=user, extra_groups=None if user is None else [],
        )  # fmt: skip
        self.pid = self._master.pid
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(home.directory / "workers"))
        (home.directory / "workers").chmod(0o777)
        self._listener.listen(16)
        self._listener.settimeout(30)

    def worker(self):
        """Fork a worker; return a function that sends it a command."""
        assert self._master.stdin is not None
        self._master.stdin.write(str(self.home.directory / "workers") + "\n")
        connection = self._listener.accept()[0]
        connection.settimeout(30)
        self._connections.append(connection)
        stream = connection.makefile("rw")

        def ask(*command):
            assert not stream.closed
            stream.write(json.dumps(command) + "\n")
            stream.flush()
            answer = stream.readline()
            if answer:
                return json.loads(answer)
            stream.close()
            return None

        return ask

    @property
    def log(self) -> str:
        return (self.home.directory / "errors.log").read_text(errors="replace")

    def close(self) -> None:
        os.killpg(self._master.pid, signal.SIGKILL)
        self._master.wait()
        assert self._master.stdin is not None
        for connection in (*self._connections, self._listener, self._master.stdin):
            connection.close()
        self._log.close()
        for pid in mentions(str(self.home.directory)):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not mentions(str(self.home.directory)), "all have ended")


@pytest.fixture
def places(short_dir):
    """Two directories that may contain a private one: that of the session, and one for all users."""
    session, temporary = short_dir / "session", short_dir / "tmp"
    for directory in (session, temporary):
        directory.mkdir()
    return session, temporary


@pytest.fixture
def service(short_dir, places):
    session, temporary = places
    home = Home(short_dir)
    service = Service(home, XDG_RUNTIME_DIR=str(session), TMPDIR=str(temporary))
    try:
        yield service
    except BaseException:
        print(service.log[-4000:])
        raise
    finally:
        service.close()


def agree(number: int, *workers) -> None:
    """Wait until each worker reads ``number``, with no other result in between."""

    def all_agree() -> bool:
        answers = [worker("read") for worker in workers]
        wrong = [a for a in answers if isinstance(a, int) and a > number]
        assert not wrong, answers
        return answers == [number] * len(workers)

    wait_for(all_agree, f"all read {number}", 15)
    assert [worker("read") for worker in workers * 5] == [number] * 5 * len(workers)


def aggregators(service: Service) -> int:
    return service.log.count("listens at")


def test_the_directory_of_the_session_is_removed(service, places):
    """A worker that starts later finds the aggregator in its new place; a worker that exits is counted."""
    session, temporary = places
    first, second = service.worker(), service.worker()
    assert first("join") == second("join")
    for worker in (first, second):
        worker("count", 10)
    agree(20, first, second)
    shutil.rmtree(session)
    second("count", 5)
    second("end")
    third = service.worker()
    wait_for(lambda: str(temporary) in third("join"), "the new worker meets elsewhere")
    third("count", 100)
    agree(125, first, third)
    fourth = service.worker()
    fourth("join")
    agree(125, first, third, fourth)
    # If the new worker came before the aggregator had moved, it has started another one, which took over.
    wait_for(lambda: aggregators(service) - service.log.count("handed over to") == 1, "one is left")
    first("count", 1)
    first("end")
    agree(126, third, fourth)


def test_the_directory_is_removed_and_the_aggregator_killed(service, places):
    """Workers start another aggregator in another place; it has every count of the living workers."""
    session, _ = places
    first, second = service.worker(), service.worker()
    assert first("join") == second("join")
    for worker in (first, second):
        worker("count", 10)
    agree(20, first, second)
    (lock,) = session.glob("tapes-*/metrics.ipc.lock")
    pid = int(lock.read_text().split()[0])
    shutil.rmtree(session)
    os.kill(pid, signal.SIGKILL)
    first("count", 1)
    agree(21, first, second)
    third = service.worker()
    third("join")
    agree(21, first, second, third)


def test_a_better_directory_appears(service, places):
    """A worker that could use a better directory joins the others in theirs."""
    session, temporary = places
    shutil.rmtree(session)
    first = service.worker()
    assert str(temporary) in first("join")
    first("count", 10)
    session.mkdir()
    second = service.worker()
    assert second("join") == first("join")
    second("count", 1)
    agree(11, first, second)


def test_a_worker_whose_environment_has_changed(service, places):
    """A worker looks in the same places as the others, whatever its own environment contains."""
    session, temporary = places
    first = service.worker()
    first("join")
    first("count", 10)
    second = service.worker()
    second("environment", {"XDG_RUNTIME_DIR": str(temporary / "nowhere"), "TMPDIR": str(session)})
    assert second("join") == first("join")
    agree(10, first, second)


def fill(path: pathlib.Path) -> None:
    """Fill a file until the file system is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.fixture
def mounted(places, request):
    """The directory of the session as a file system of its own; yields a function that remounts it."""
    session = str(places[0])

    def mount(*arguments: str) -> bool:
        return subprocess.run(["mount", *arguments, session], check=False).returncode == 0

    if os.geteuid() or not mount("-t", "tmpfs", "-o", "size=1m", "none"):
        pytest.skip("mounting is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", session], check=True)


def test_a_directory_that_is_full(service, places, mounted):
    """On a full file system the aggregator keeps serving, and later workers find it."""
    session, _ = places
    first = service.worker()
    assert str(session) in first("join")
    first("count", 10)
    agree(10, first)
    fill(session / "big")
    second = service.worker()
    assert second("join") == first("join")
    second("count", 1)
    agree(11, first, second)
    assert aggregators(service) == 1


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_directory_that_becomes_writable_later(service, places, mounted, how):
    """If only the second worker can use a directory, both meet where the first one has decided."""
    session, temporary = places
    fill(session / "big")
    if how == "read-only":
        assert mounted("-o", "remount,ro")
    first = service.worker()
    assert str(temporary) in first("join")
    first("count", 10)
    if how == "read-only":
        assert mounted("-o", "remount,rw")
    (session / "big").unlink()
    second = service.worker()
    assert second("join") == first("join")
    second("count", 1)
    agree(11, first, second)
    assert aggregators(service) == 1


def test_two_aggregators_become_one(service, places):
    """An aggregator whose files were removed hands everything over to one that was started meanwhile."""
    session, temporary = places
    first, second = service.worker(), service.worker()
    assert first("join") == second("join")
    first("count", 10)
    second("count", 5)
    agree(15, first, second)
    second("end")  # into the total of those that left
    agree(15, first)
    (private,) = session.glob("tapes-*")
    pid = int((private / "metrics.ipc.lock").read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        shutil.rmtree(session)
        third = service.worker()
        assert str(temporary) in third("join")
        third("count", 100)
        assert aggregators(service) == 2
    finally:
        os.kill(pid, signal.SIGCONT)
    agree(115, first, third)
    wait_for(lambda: not pathlib.Path(f"/proc/{pid}").exists(), "the former aggregator has left")
    agree(115, first, third)
