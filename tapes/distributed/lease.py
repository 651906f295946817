"""Who starts an aggregator, and how long it lives.

An aggregator serves an *owner* (the process that started it: gunicorn's master, Tornado's parent) and the
workers that it hears from. It watches all of them through pidfds, which report every kind of death, and lives
until its owner has ended and its workers have said goodbye or ended too. How long it waits for workers that
outlive the owner is its ``patience``; a little grace at the end lets last words in.

Processes where there are no pidfds (macOS) are watched by asking whether the pid exists.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import stat
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from tapes.distributed.address import resolve
from tapes.errors import AddressError, AddressInUse, AggregatorUnavailable, TapesError

if TYPE_CHECKING:
    from tapes.distributed.aggregator import Aggregator

__all__ = ["Lease", "ProcessWatch", "Readiness", "launch"]

GRACE_SECONDS = 0.5
_PATIENCE_SECONDS = 1.0
_READY_SECONDS = 10.0
_SHORTEST = "/tmp"  # noqa: S108 - where other directories are too long for a socket; ours in it is private
_SERVER_VARIABLES = ("GUNICORN_FD", "GUNICORN_PID", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET")

_log = logging.getLogger("tapes.distributed")


class ProcessWatch:
    """Tells when a process has ended, whatever becomes of its pid."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fd = -1
        self._over = False
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._over = True
        except (AttributeError, OSError):
            pass  # no pidfds on this system: ended() asks for the pid

    def ended(self) -> bool:
        """Return whether it has ended."""
        if not self._over:
            if self._fd >= 0:
                poll = select.poll()
                poll.register(self._fd, select.POLLIN)
                self._over = bool(poll.poll(0))
            else:
                try:
                    os.kill(self._pid, 0)
                except ProcessLookupError:
                    self._over = True
                except PermissionError:
                    pass
        return self._over

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Lease:
    """How long an aggregator lives.

    Args:
        owner_pid: The process that it serves; ``None`` to live until told to stop.
        patience_seconds: How long to wait for workers that outlive the owner.
    """

    def __init__(self, owner_pid: int | None, *, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._owner = None if owner_pid is None else ProcessWatch(owner_pid)
        self._patience_seconds = patience_seconds
        self._told = False
        self._ownerless_since: float | None = None
        self._idle_since: float | None = None

    @property
    def has_owner(self) -> bool:
        """Whether it serves a process of its own accord, and not a person at a terminal."""
        return self._owner is not None

    def tell(self) -> None:
        """Ask it to end as if the owner had ended."""
        self._told = True

    def expired(self, now: float, workers: int) -> bool:
        """Return whether it is over, given how many workers live at ``now``."""
        if not self._told and not (self._owner is not None and self._owner.ended()):
            return False
        if self._ownerless_since is None:
            self._ownerless_since = now
        if workers:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._idle_since is not None and now - self._idle_since >= GRACE_SECONDS:
            return True
        return now - self._ownerless_since >= self._patience_seconds


class Readiness:
    """A pipe on which an aggregator that is being started says that it is ready, or why it can't be."""

    def __init__(self, fds: tuple[int, int] | None = None) -> None:
        self._receiver, self._sender = os.pipe() if fds is None else fds

    @property
    def sender(self) -> int:
        """The descriptor that the starting process needs."""
        return self._sender

    def run(self, aggregator: Aggregator) -> int:
        """Run ``aggregator`` to its end, telling the other side how it started; return the exit status."""
        if self._receiver >= 0:
            os.close(self._receiver)
        try:
            aggregator.run(self._ready)
        except TapesError as error:
            self._tell(f"{type(error).__name__}\n{error}")
            return 1
        except Exception as error:
            _log.exception("tapes: the aggregator ended by an unexpected error")
            self._tell(f"AggregatorUnavailable\nthe aggregator failed ({error!r})")
            return 1
        return 0

    def wait(self) -> None:
        """Return when the aggregator is ready.

        Raises:
            AddressError, AggregatorUnavailable: With the reason why it can't be started.
        """
        os.close(self._sender)
        said = b""
        try:
            while True:
                if not select.select([self._receiver], [], [], _READY_SECONDS)[0]:
                    break
                piece = os.read(self._receiver, 65536)
                said += piece
                if not piece:
                    break
        finally:
            os.close(self._receiver)
        kind, _, sentence = said.decode(errors="replace").partition("\n")
        if kind != "ready":
            failure = _FAILURES.get(kind, AggregatorUnavailable)
            raise failure(sentence or f"the aggregator was not ready within {_READY_SECONDS:g} s")

    def _ready(self) -> None:
        self._tell("ready")

    def _tell(self, text: str) -> None:
        if self._sender >= 0:
            with contextlib.suppress(OSError):
                os.write(self._sender, text.encode())
                os.close(self._sender)
            self._sender = -1


def _failures(root: type[TapesError]) -> dict[str, type[TapesError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_failures(child))
    return found


_FAILURES = {**_failures(AddressError), **_failures(AggregatorUnavailable)}


def launch(owner_pid: int) -> str:
    """Start a detached aggregator that serves the process ``owner_pid`` and its workers.

    It runs in a session of its own and is no child of the caller, so that no server reaps or signals it.
    Without ``TAPES_ADDR`` it listens in a private directory, which it removes at its end; with it, there,
    unless somebody does already.

    Returns:
        Its address, for ``TAPES_ADDR``.

    Raises:
        AddressError, AggregatorUnavailable: If it can't be started.
    """
    given = os.environ.get("TAPES_ADDR")
    directory = "" if given else _private_directory(owner_pid)
    endpoints = resolve(given or f"ipc://{directory}/metrics.ipc")
    readiness = Readiness()
    try:
        subprocess.run(
            [
                sys.executable, "-c", _BOOTSTRAP, os.pathsep.join(filter(None, sys.path)),
                endpoints.publish, str(owner_pid), directory, str(readiness.sender),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[readiness.sender],
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k not in _SERVER_VARIABLES},
            check=False,
        )  # fmt: skip
    except OSError as error:
        raise AggregatorUnavailable(f"the aggregator can't be started ({error})") from None
    try:
        readiness.wait()
    except AddressInUse:
        if not given:
            raise  # with TAPES_ADDR, the one that is there is the one to use
    return endpoints.publish


# The working directory is taken off the path before anything is imported, so that no file in it can
# stand in for a module of the library.
_BOOTSTRAP = """\
import sys; sys.path[:1] = []; argv = sys.argv[1:]
sys.path += [path for path in argv.pop(0).split(__import__("os").pathsep) if path not in sys.path]
from tapes.distributed.lease import serve; serve(*argv)
"""


def serve(address: str, owner_pid: str, directory: str, ready_fd: str) -> None:
    """Be the aggregator that `launch` starts; the calling process returns at once."""
    from tapes.distributed.aggregator import Aggregator

    if os.fork():
        os._exit(0)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="[%(process)d] [%(levelname)s] %(message)s"
    )
    os.umask(0o077)
    os.chdir("/")
    lease = Lease(int(owner_pid), patience_seconds=float("inf"))
    readiness = Readiness((-1, int(ready_fd)))
    try:
        status = readiness.run(Aggregator(resolve(address), [], lease))
    finally:
        if directory:
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    sys.exit(status)


def _private_directory(owner_pid: int) -> str:
    """Make and return a directory of our own, named after the process that it is for."""
    name = f"tapes-{owner_pid}-{_started(owner_pid)}"
    reasons = []
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), _SHORTEST):
        if not parent:
            continue
        directory = os.path.join(os.path.abspath(parent), name)
        try:
            resolve(f"ipc://{directory}/metrics.ipc")
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            found = os.lstat(directory)
        except (OSError, AddressError) as error:
            reasons.append(str(error))
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return directory
        reasons.append(f"{directory} is not ours alone")
    raise AggregatorUnavailable(
        f"there is no directory for the aggregator's sockets ({'; '.join(reasons)})",
        remedy="set TMPDIR to a directory that can be written to, or TAPES_ADDR to an address",
    )


def _started(pid: int) -> str:
    """Return when a process started, in the kernel's clock ticks, so that a reused pid is told apart."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return "0"
