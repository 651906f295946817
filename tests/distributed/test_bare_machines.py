"""A service starts on bare machines: a read-only root, no /proc, no standard streams, or no interpreter."""

from __future__ import annotations

import itertools
import modulefinder
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

import tapes
from tests.processes import clean_environment, python_for_any_user, wait_for

SERVICE = """
import os, sys
if len(sys.argv) > 1:
    os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
import tapes
def work():
    tapes.join()
    tapes.counter("n").increment(10)
def end():  # without what Python prints of an error
    tapes.close()
    os._exit(0)
try:
    for _ in range(3):
        if os.fork() == 0:
            work()
            end()
    for _ in range(3):
        assert os.wait()[1] == 0
    work()
    print(os.environ["TAPES_ADDR"], tapes.get_stats().n.value)
except tapes.TapesError as error:
    print(repr(error))
"""
"""Three children and their parent count and one of them reads; as another user if one is given."""

READ_ONLY = """
mount --make-rprivate / && mount -o remount,bind,ro / && ! mkdir /var/writable 2>/dev/null || exit 77
case $1 in
    /dev/shm) mount -t tmpfs -o mode=1777 none /dev/shm;;
    *) mount -t tmpfs -o ro none /dev/shm;;
esac
case $1 in
    /tmp) mount --bind /tmp /tmp && mount -o remount,bind,rw /tmp;;  # the interpreter may be there
    /run) mount -t tmpfs -o mode=755 none /run && install -d -m 700 -o $2 /run/user/$2;;
    /mnt) mount -t tmpfs -o mode=700,uid=$2 none /mnt;;
esac || exit 77
shift 2
exec "$@"
"""
"""Runs a command where nothing but one directory is writable; status 77 where that can't be arranged."""

USERS = (0, 12345)  # the second one has no entry in passwd, and no home

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


def started(writable: str, user: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the service as ``user``, with only ``writable`` writable, and only ``environment`` set."""
    python, path = python_for_any_user("zmq", "msgpack", "addict")
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", writable, str(user),
         python, "-c", SERVICE, str(user)],
        cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip


def outputs(writable: str, **environment: str) -> list[str]:
    """Return what the service prints as each of `USERS`, after it and its aggregator have ended."""
    services = [started(writable, user, environment) for user in USERS]
    found = []
    try:
        for service in services:
            output, errors = service.communicate(timeout=60)
            if service.returncode == 77:
                pytest.skip(f"mounting is not permitted here: {errors.strip()}")
            assert service.returncode == 0, errors
            assert "Traceback" not in errors, errors
            found.append(output)
    finally:
        for service in services:
            if service.returncode is None:
                os.killpg(service.pid, signal.SIGKILL)
                service.communicate()
    return found


@needs_root
@pytest.mark.needs("unshare")
@pytest.mark.parametrize(
    ("writable", "environment", "meets"),
    [
        ("/tmp", {}, "/tmp/tapes-"),
        ("/dev/shm", {}, "/dev/shm/tapes-"),
        ("/run", {}, "/run/user/{user}/tapes-"),
        ("/mnt", {"XDG_RUNTIME_DIR": "/mnt"}, "/mnt/tapes-"),
        ("/mnt", {"TMPDIR": "/mnt"}, "/mnt/tapes-"),
        ("/mnt", {"TAPES_ADDR": "ipc:///mnt/m.ipc"}, "/mnt/m.ipc"),
        ("/dev/shm", {"XDG_RUNTIME_DIR": "/nowhere", "TMPDIR": "/var"}, "/dev/shm/tapes-"),
    ],
    ids=["tmp", "shm", "run", "XDG_RUNTIME_DIR", "TMPDIR", "TAPES_ADDR", "fall through"],
)
def test_a_service_with_a_read_only_root_meets_where_it_can_write(writable, environment, meets):
    """One writable directory is enough, for root and for a user without a passwd entry and a home."""
    for user, output in zip(USERS, outputs(writable, **environment)):
        address, counted = output.split()
        assert address.startswith("ipc://" + meets.replace("{user}", str(user)))
        assert counted == "40"


@needs_root
@pytest.mark.needs("unshare")
def test_without_a_writable_directory_one_sentence_explains_what_to_do():
    """Without a writable directory the error names the tried ones and both remedies, in every process."""
    for user, output in zip(USERS, outputs("nothing")):
        (line,) = set(output.splitlines())  # each of the processes has the same error
        assert line.startswith("AggregatorUnavailable(")
        assert f"set XDG_RUNTIME_DIR or TMPDIR to a directory that user {user} can write to" in output
        assert "or TAPES_ADDR to an address" in output
        for tried in ("/tmp: Read-only file system", "/dev/shm: Read-only file system"):
            assert tried in output


@needs_root
@pytest.mark.needs("unshare")
def test_a_service_counts_without_proc(home):
    """A service counts exactly without /proc, where start times and descriptors can't be looked up."""
    without = 'mount --make-rprivate / && umount -l /proc || exit 77; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", without, "sh", sys.executable, "-c", SERVICE]
    status, output, errors = home.run(command)
    if status == 77 or "unshare failed" in errors:
        pytest.skip(f"/proc can't be unmounted here: {errors.strip()}")
    assert status == 0, errors
    assert output.split()[1:] == ["40"]


CLOSING = """
import os, sys
for fd in map(int, sys.argv[1]):
    os.close(fd)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

WITHOUT_STREAMS = """
import tapes
try:
    tapes.join()
    tapes.counter("n").increment(10)
    result = str(tapes.get_stats().n.value)
except Exception as error:
    result = repr(error)
with open("result", "w") as file:
    file.write(result)
"""


@pytest.mark.parametrize("closed", ["0", "1", "2", "01", "02", "12", "012"])
def test_a_process_without_standard_streams_joins(home, closed):
    """A process joins, whichever of descriptors 0, 1 and 2 are closed at its start and used by 0MQ then."""
    status, _, errors = home.run([sys.executable, "-c", CLOSING, closed, "-c", WITHOUT_STREAMS])
    assert status == 0, errors
    assert (home.directory / "result").read_text() == "10"


def long_path(directories: int) -> str:
    return f"import sys; sys.path += [f'/nowhere/{{number:0100}}' for number in range({directories})]\n"


def test_a_module_path_of_200_kib_reaches_the_aggregator(home):
    """The aggregator gets a sys.path of 200 KiB, although Linux limits one argument to 128 KiB."""
    status, output, errors = home.run([sys.executable, "-c", long_path(2000) + SERVICE])
    assert (status, output.split()[1:]) == (0, ["40"]), errors


def test_a_module_path_that_is_too_long_is_an_error_with_a_remedy(home):
    """A sys.path that is too long for any process is an AggregatorUnavailable, not an OSError."""
    status, output, errors = home.run([sys.executable, "-c", long_path(40000) + SERVICE])
    assert status == 0, errors
    assert output.startswith("AggregatorUnavailable(")
    assert "start it by hand: RegistryAggregator" in output


FROZEN = """
import os, signal, socket, sys, threading, time
sys.frozen, sys.executable = True, "/bin/false"  # as PyInstaller sets them
sys.exec_prefix = sys.base_exec_prefix = os.environ["PATH"] = "/nowhere"
import tapes
listener = socket.create_server(("127.0.0.1", 0))
signal.signal(signal.SIGUSR1, lambda *_: open("handled", "w").close())
threading.Thread(target=time.sleep, args=(0.5,)).start()
tapes.join()
tapes.counter("n").increment(10)
port = listener.getsockname()[1]
listener.close()
print(tapes.get_stats().n.value, os.environ["TAPES_ADDR"].partition("://")[2], port, flush=True)
for line in sys.stdin:
    tapes.counter("n").increment(1)
    try:
        print(tapes.get_stats().n.value, flush=True)
    except tapes.TapesError:
        print("none", flush=True)
"""
"""A frozen application: joins, and reads for each line of its input."""


def test_a_frozen_application_starts_and_restarts_its_aggregator(home):
    """Where ``sys.executable`` is the application, the aggregator is a fork that shares only its memory."""
    with (home.directory / "errors.log").open("w") as log, subprocess.Popen(
        [sys.executable, "-W", "error", "-c", FROZEN], cwd=home.directory, stderr=log, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment(**home.environment),
    ) as application:  # fmt: skip
        commands, answers = application.stdin, application.stdout
        assert commands is not None
        assert answers is not None
        counted, path, port = answers.readline().split()
        assert counted == "10"
        aggregator = int(pathlib.Path(f"{path}.lock").read_text().split()[0])
        with socket.create_server(("127.0.0.1", int(port))):
            pass  # the aggregator does not hold what the application listens on
        os.kill(aggregator, signal.SIGUSR1)  # kills it: the handler is the application's
        asked = itertools.count(1)

        def read() -> bool:
            commands.write("\n")
            return answers.readline().strip() == str(10 + next(asked))

        wait_for(read, "the next aggregator answers", every=0.1)
        commands.close()
        assert application.wait(30) == 0
    assert not (home.directory / "handled").exists()
    assert (home.directory / "errors.log").read_text().count("listens at") == 2


def test_programs_that_freeze_applications_find_late_imports():
    """Freezers read import statements: those of ``import tapes`` name every module that it uses later."""
    finder = modulefinder.ModuleFinder(excludes=["zmq", "msgpack", "addict", "multiprocessing", "asyncio"])
    finder.load_file(tapes.__file__)
    assert {f"tapes.distributed.{name}" for name in ("aggregator.main", "connection")} <= {*finder.modules}
