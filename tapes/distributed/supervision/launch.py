"""Starting an aggregator in a process of its own.

The process is detached. It has its own session and is not a child of the starter, so no server reaps, signals
or restarts it. It reports on a pipe that it is ready, or why it can't start. It runs
`tapes.distributed.aggregator.main`, which no worker imports.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys

from tapes import forks, threads
from tapes.distributed.storage.locks import is_served
from tapes.distributed.storage.runtime_directory import User
from tapes.distributed.supervision import fork_launch
from tapes.distributed.supervision.readiness import Readiness
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressInUse, AggregatorUnavailable
from tapes.processes import Process

_NOT_INHERITED = (
    "GUNICORN_FD", "GUNICORN_PID", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET",
    "TAPES_ADDR", "TAPES_CONNECTED", "TAPES_LABELS",
)  # fmt: skip

_PROGRAM = "tapes.distributed.aggregator.main"


def launch(endpoints: Endpoints, owner: Process, reason: str, user: User, *, wait: bool = True) -> None:
    """Start a detached aggregator that lives as long as ``owner``; do nothing if one runs already.

    With ``wait`` return when it is ready, otherwise as soon as its process exists. It logs ``reason``.
    Raises AddressError, AggregatorUnavailable or InvalidArgument if it can't start.
    """
    # 1. Start its process.
    readiness = Readiness()
    arguments = [
        endpoints.publish, str(owner.pid), str(owner.started), reason,
        str(user.uid), str(user.gid), str(readiness.sender),
    ]  # fmt: skip
    try:
        _start_process(arguments, readiness)
    except BaseException as error:
        readiness.close()
        if not isinstance(error, OSError):
            raise
        raise AggregatorUnavailable(
            f"the aggregator can't be started ({error.strerror or error})",
            remedy="start it by hand: RegistryAggregator(…).start() before the fork, connect() after it",
        ) from None
    # 2. Wait until it is ready.
    if not wait:
        readiness.close()
        return
    try:
        readiness.wait()
    except AddressInUse:
        # 3. Another aggregator may serve these endpoints; a reporter's address in use is an error.
        if endpoints.path is not None and not is_served(endpoints):
            raise


def _start_process(arguments: list[str], readiness: Readiness) -> None:
    environment = {name: text for name, text in os.environ.items() if name not in _NOT_INHERITED}
    if getattr(sys, "frozen", False):  # sys.executable is the application
        serve = importlib.import_module(_PROGRAM).serve
        fork_launch.fork(lambda: serve(*arguments), environment, readiness.sender)
        readiness.close_writer()
        return
    # Each directory is an argument of its own: the kernel limits the length of one to 128 KiB.
    command = [_python(), "-c", _BOOTSTRAP, *arguments, *filter(None, sys.path)]
    if threads.is_patched() and threads.in_native_thread():
        _spawn(command, readiness.sender, environment)
        readiness.close_writer()
        return
    with forks.no_fork():
        starting = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=None if fork_launch.has_standard_error() else subprocess.DEVNULL,
            pass_fds=[readiness.sender], start_new_session=True, env=environment,
        )  # fmt: skip
        readiness.close_writer()
    starting.wait()


def _spawn(command: list[str], fd: int, environment: dict[str, str]) -> None:
    """Do what `subprocess` does, in a native thread: gevent has patched that module."""
    os.set_inheritable(fd, True)
    unused = (0, 1) if fork_launch.has_standard_error() else (0, 1, 2)
    null_streams = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in unused]
    spawn = threads.unpatched("os", "posix_spawn")
    pid = spawn(command[0], command, environment, file_actions=null_streams, setsid=True)
    threads.unpatched("os", "waitpid")(pid, 0)


# The program closes inherited descriptors, and removes the working directory from the path before it imports
# anything: a file there must not shadow a module of the library.
_BOOTSTRAP = f"""\
import os, sys; sys.path[:1] = []; argv, paths = sys.argv[1:8], sys.argv[8:]
fd = int(argv[-1]); os.closerange(3, fd); os.closerange(fd + 1, 65536)
sys.path += [path for path in paths if path not in sys.path]
from {_PROGRAM} import serve; serve(*argv)
"""


def _python() -> str:
    """Return an interpreter of this version; in a server that embeds Python, ``sys.executable`` is none."""
    if os.path.basename(sys.executable or "").startswith(("python", "pypy")):
        return sys.executable
    name = "pypy3" if sys.implementation.name == "pypy" else "python{}.{}".format(*sys.version_info)
    prefixes = (sys.exec_prefix, sys.base_exec_prefix)
    paths = (os.path.join(prefix, "bin", each) for prefix in prefixes for each in (name, "python3"))
    found = next((path for path in paths if os.access(path, os.X_OK)), None) or shutil.which(name)
    if found is None:
        raise AggregatorUnavailable(
            "no Python interpreter was found to run the aggregator",
            remedy=f"put {name} on the PATH, or start the service with: tapes run -- COMMAND",
        )
    return found
