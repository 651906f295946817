"""Starting an aggregator in a process of its own, and being one.

The process is detached: a session of its own, and no child of the starter, so that no server reaps, signals
or restarts it. It says on a pipe when it is ready, or why it can't be.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import resource
import select
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tapes import forks, threads
from tapes.distributed import detached, directory
from tapes.distributed.address import Endpoints, is_served, resolve
from tapes.distributed.lease import Lease
from tapes.distributed.processes import reaps
from tapes.distributed.sweeping import sweep
from tapes.distributed.title import set_title
from tapes.errors import AddressError, AddressInUse, AggregatorUnavailable, InvalidArgument, TapesError
from tapes.forks import Process
from tapes.reporting.configured import HTTP, STATSD, reporters_from

if TYPE_CHECKING:
    from tapes.distributed.aggregator import Aggregator

__all__ = ["Readiness", "launch", "serve"]

_READY_SECONDS = 10.0
_END = b"\0"
_NOT_HANDED_ON = (
    "GUNICORN_FD", "GUNICORN_PID", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET",
    "TAPES_ADDR", "TAPES_CONNECTED", "TAPES_LABELS",
)  # fmt: skip

_log = logging.getLogger("tapes.distributed")


class Readiness:
    """A pipe on which an aggregator that is being started says that it is ready, or why it can't be.

    Args:
        fds: Its two ends, -1 for one that is not here; a new pipe if not given.
    """

    NOT_READY, CRASHED = 1, 2
    """Exit statuses: it could not be started; it failed later."""

    def __init__(self, fds: tuple[int, int] | None = None) -> None:
        self._receiver, self._sender = _pipe() if fds is None else fds
        self._said = False
        self._silence = f"the aggregator was not ready within {_READY_SECONDS:g} s"

    @property
    def sender(self) -> int:
        """The descriptor that the starting process needs."""
        return self._sender

    def run(self, aggregator: Aggregator) -> int:
        """Run ``aggregator`` to its end, telling the other side how it started; return the exit status."""
        if self._receiver >= 0:
            os.close(self._receiver)
        _settle(aggregator)
        try:
            aggregator.run(lambda: self.tell("ready"))
        except TapesError as error:
            if self._said:
                _log.exception("tapes: the aggregator ended by an error")
            return self._fail(f"{type(error).__name__}\n{error}")
        except Exception as error:
            _log.exception("tapes: the aggregator ended by an unexpected error")
            return self._fail(f"AggregatorUnavailable\nthe aggregator failed ({error!r})")
        return 0

    def _fail(self, text: str) -> int:
        status = self.CRASHED if self._said else self.NOT_READY
        self.tell(text)
        return status

    def wait(self) -> None:
        """Return when the aggregator is ready.

        Raises:
            AddressError, AggregatorUnavailable, InvalidArgument: With the reason why it can't be started.
        """
        self.hand_over()
        said = b""
        # select() knows no descriptors above 1023. In a thread of ours gevent's poll() would leave a loop
        # behind; eventlet has none.
        is_real = threads.is_ours() or not hasattr(select, "poll")
        poll = threads.real("select", "poll")() if is_real else select.poll()
        poll.register(self._receiver, select.POLLIN)
        try:
            # A child that was forked meanwhile may hold the other end open, so the end is marked.
            while not said.endswith(_END) and poll.poll(_READY_SECONDS * 1000):
                piece = os.read(self._receiver, 65536)
                said += piece
                if not piece:
                    self._silence = "the aggregator died before it was ready"
                    break
        finally:
            os.close(self._receiver)
        kind, _, sentence = said.rstrip(_END).decode(errors="replace").partition("\n")
        if kind != "ready":
            failure = _FAILURES.get(kind, AggregatorUnavailable)
            raise failure(sentence or self._silence)

    def hand_over(self) -> None:
        """Close the end that another process has now: when that dies, this is heard."""
        if self._sender >= 0:
            os.close(self._sender)
            self._sender = -1

    def give_up(self) -> None:
        """Close both ends: it is for others to use, or nobody was started."""
        self.hand_over()
        if self._receiver >= 0:
            os.close(self._receiver)
            self._receiver = -1

    def tell(self, text: str) -> None:
        """Say ``text``, once."""
        self._said = True
        if self._sender >= 0:
            with contextlib.suppress(OSError):
                os.write(self._sender, text.encode() + _END)
                os.close(self._sender)
            self._sender = -1


def _pipe() -> tuple[int, int]:
    """Return the ends of a new pipe; neither has the number of a standard stream, which may be closed."""
    receiver, sender = os.pipe()
    return _above_standard_streams(receiver), _above_standard_streams(sender)


def _above_standard_streams(fd: int) -> int:
    if fd > 2:
        return fd
    higher = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return higher


def _settle(aggregator: Aggregator) -> None:
    """Make a process that is an aggregator's alone fit for many workers, and known in ``ps``."""
    reason = aggregator._reason and f", started for {aggregator._reason}"
    set_title(f"tapes aggregator {aggregator._endpoints.publish}{reason}")
    gc.set_threshold(50_000, 20, 50)  # states have no cycles, and there are many of them
    sys.setswitchinterval(0.0005)  # what only takes in messages and clients does not wait for what renders
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a worker takes three descriptors


def _failures(root: type[TapesError]) -> dict[str, type[TapesError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_failures(child))
    return found


_FAILURES = {**_failures(AddressError), **_failures(AggregatorUnavailable), **_failures(InvalidArgument)}


def launch(
    endpoints: Endpoints, owner: Process, reason: str, user: directory.User, *, wait: bool = True
) -> None:
    """Start a detached aggregator that serves ``owner`` and its workers; nothing if one is there.

    Args:
        endpoints: Where it listens.
        owner: The process for which it lives.
        reason: Why it is started, for the log.
        user: Whom it is to be run by.
        wait: Return when it is ready; else as soon as it is on its way.

    Raises:
        AddressError, AggregatorUnavailable, InvalidArgument: If it can't be started.
    """
    python = "" if detached.is_frozen() else _python()
    readiness = Readiness()
    environment = {name: text for name, text in os.environ.items() if name not in _NOT_HANDED_ON}
    arguments = [
        endpoints.publish, str(owner.pid), str(owner.started), reason,
        str(user.uid), str(user.gid), str(readiness.sender),
    ]  # fmt: skip
    # Each directory is an argument of its own: the kernel limits the length of one to 128 KiB.
    command = [python, "-c", _BOOTSTRAP, *arguments, *filter(None, sys.path)]
    try:
        if not python:
            detached.fork(lambda: serve(*arguments), environment, readiness.sender)
            readiness.hand_over()
        elif threads.is_patched() and threads.is_ours():
            _spawn(command, readiness.sender, environment)
            readiness.hand_over()
        else:
            with forks.no_fork():
                starting = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if detached.has_standard_error() else subprocess.DEVNULL,
                    pass_fds=[readiness.sender],
                    start_new_session=True,
                    env=environment,
                )
                readiness.hand_over()
            starting.wait()
    except OSError as error:
        readiness.give_up()
        raise AggregatorUnavailable(
            f"the aggregator can't be started ({error.strerror or error})",
            remedy="start it by hand: RegistryAggregator(…).start() before the fork, connect() after it",
        ) from None
    except BaseException:
        readiness.give_up()
        raise
    if not wait:
        readiness.give_up()
        return
    try:
        readiness.wait()
    except AddressInUse:
        if endpoints.path is not None and not is_served(endpoints):
            raise  # by a reporter's; else the aggregator that is there is the one to use


def _spawn(command: list[str], fd: int, environment: dict[str, str]) -> None:
    """Do what `subprocess` does, in a thread of which gevent, which has replaced that, knows nothing."""
    os.set_inheritable(fd, True)
    unused = (0, 1) if detached.has_standard_error() else (0, 1, 2)
    nothing = [(os.POSIX_SPAWN_OPEN, given, os.devnull, os.O_RDWR, 0) for given in unused]
    pid = threads.real("os", "posix_spawn")(
        command[0], command, environment, file_actions=nothing, setsid=True
    )
    threads.real("os", "waitpid")(pid, 0)


# What it has inherited is closed, and the working directory is taken off the path before anything is
# imported, so that no file in it can stand in for a module of the library.
_BOOTSTRAP = """\
import os, sys; sys.path[:1] = []; argv, paths = sys.argv[1:8], sys.argv[8:]
fd = int(argv[-1]); os.closerange(3, fd); os.closerange(fd + 1, 65536)
sys.path += [path for path in paths if path not in sys.path]
from tapes.distributed.launch import serve; serve(*argv)
"""


def serve(address: str, pid: str, started: str, reason: str, uid: str, gid: str, ready_fd: str) -> None:
    """Be the aggregator that `launch` starts; the calling process returns at once."""
    starter, readiness = os.getpid(), Readiness((-1, int(ready_fd)))
    try:
        child = os.fork()
    except OSError as error:
        readiness.tell(f"AggregatorUnavailable\nthe aggregator can't be started ({error.strerror})")
        os._exit(1)
    if child:
        os._exit(0)
    from tapes.distributed.aggregator import Aggregator
    from tapes.distributed.keeper import Keeper  # which imports this module

    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="[%(process)d] [%(levelname)s] %(message)s"
    )
    _become(directory.User(int(uid), int(gid)))
    os.umask(0o077)
    os.chdir("/")
    sweep()
    endpoints = resolve(address)
    try:
        configured = {name: os.environ[name] for name in (HTTP, STATSD) if os.environ.get(name)}
        reporters = reporters_from(configured)
    except TapesError as error:
        readiness.tell(f"{type(error).__name__}\n{error}")
        sys.exit(1)
    owner, kept = Process(int(pid), int(started)), not reaps(_adopter(starter))

    def run(readiness: Readiness, ends: bool = False) -> int:
        lease = Lease.joined(owner)
        aggregator = Aggregator(endpoints, reporters, lease, reason=reason, configured=configured, kept=kept)
        return readiness.run(aggregator)

    sys.exit(Keeper(run, owner).keep_while_killed(readiness) if kept else run(readiness))


def _adopter(parent: int) -> int:
    """Return the process that becomes the parent of this one when ``parent`` has ended."""
    deadline = time.monotonic() + 1.0
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.001)
    return os.getppid()


def _become(user: directory.User) -> None:
    if user != directory.User.ourselves():
        os.setgroups([])
        os.setgid(user.gid)
        os.setuid(user.uid)


def _python() -> str:
    """Return an interpreter of this version; servers that embed Python call themselves ``sys.executable``."""
    if os.path.basename(sys.executable or "").startswith(("python", "pypy")):
        return sys.executable
    name = (
        "pypy3" if sys.implementation.name == "pypy" else f"python{sys.version_info[0]}.{sys.version_info[1]}"
    )
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        for found in (os.path.join(prefix, "bin", name), os.path.join(prefix, "bin", "python3")):
            if os.access(found, os.X_OK):
                return found
    found_on_path = shutil.which(name)
    if found_on_path is None:
        raise AggregatorUnavailable(
            "no Python was found to start the aggregator with",
            remedy=f"put {name} on the PATH, or start the service by: tapes run -- COMMAND",
        )
    return found_on_path
