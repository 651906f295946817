"""Starting an aggregator in a process of its own.

The process is detached: it has a session of its own and is no child of the starter, so no server reaps,
signals or restarts it. It reports on a pipe when it is ready, or why it can't be. What it runs is in
`tapes.distributed.aggregator.main`, which no worker imports.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys

from tapes import forks, threads
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import is_served
from tapes.distributed.supervision import fork_launch
from tapes.distributed.supervision.readiness import Readiness
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressInUse, AggregatorUnavailable
from tapes.processes import Process

__all__ = ["launch"]

_NOT_HANDED_ON = (
    "GUNICORN_FD", "GUNICORN_PID", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET",
    "TAPES_ADDR", "TAPES_CONNECTED", "TAPES_LABELS",
)  # fmt: skip

_PROGRAM = "tapes.distributed.aggregator.main"


def launch(
    endpoints: Endpoints, owner: Process, reason: str, user: runtime_directory.User, *, wait: bool = True
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
    python = "" if fork_launch.is_frozen() else _python()
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
            fork_launch.fork(
                lambda: importlib.import_module(_PROGRAM).serve(*arguments), environment, readiness.sender
            )
            readiness.close_writer()
        elif threads.is_patched() and threads.in_native_thread():
            _spawn(command, readiness.sender, environment)
            readiness.close_writer()
        else:
            with forks.no_fork():
                starting = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if fork_launch.has_standard_error() else subprocess.DEVNULL,
                    pass_fds=[readiness.sender],
                    start_new_session=True,
                    env=environment,
                )
                readiness.close_writer()
            starting.wait()
    except OSError as error:
        readiness.close()
        raise AggregatorUnavailable(
            f"the aggregator can't be started ({error.strerror or error})",
            remedy="start it by hand: RegistryAggregator(…).start() before the fork, connect() after it",
        ) from None
    except BaseException:
        readiness.close()
        raise
    if not wait:
        readiness.close()
        return
    try:
        readiness.wait()
    except AddressInUse:
        if endpoints.path is not None and not is_served(endpoints):
            raise  # by a reporter's; else the aggregator that is there is the one to use


def _spawn(command: list[str], fd: int, environment: dict[str, str]) -> None:
    """Do what `subprocess` does, in a thread of which gevent, which has replaced that, knows nothing."""
    os.set_inheritable(fd, True)
    unused = (0, 1) if fork_launch.has_standard_error() else (0, 1, 2)
    nothing = [(os.POSIX_SPAWN_OPEN, given, os.devnull, os.O_RDWR, 0) for given in unused]
    pid = threads.unpatched("os", "posix_spawn")(
        command[0], command, environment, file_actions=nothing, setsid=True
    )
    threads.unpatched("os", "waitpid")(pid, 0)


# What it has inherited is closed, and the working directory is taken off the path before anything is
# imported, so that no file in it can stand in for a module of the library.
_BOOTSTRAP = f"""\
import os, sys; sys.path[:1] = []; argv, paths = sys.argv[1:8], sys.argv[8:]
fd = int(argv[-1]); os.closerange(3, fd); os.closerange(fd + 1, 65536)
sys.path += [path for path in paths if path not in sys.path]
from {_PROGRAM} import serve; serve(*argv)
"""


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
