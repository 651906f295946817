"""Which service this process belongs to, and where the processes of a service meet.

A service is identified by its *root process*: the process that all of its workers descend from, such as
gunicorn's master, or the parent of a pool. Every process finds the same root process: it goes from parent to
parent as long as a process was forked by its parent and has not executed another program.

The service meets in a directory that is named after its root process. The environment determines where
that directory can be. It differs between processes and changes with time: the end of a login session removes
``XDG_RUNTIME_DIR``. So the first process decides and hands the address down in ``TAPES_ADDR``, and every
process looks for an aggregator in all `places` before it starts one.

All users share several of these places. A user who knew the name of a private directory could create it
first. So the name ends with a number that other users can't know: it is computed from the addresses of the
root process's program in memory, which the kernel chooses at random and shows to the same user only. A
directory of another user is never a place of the service, whatever its name is.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from tapes import forks, processes
from tapes.hashing import blake2b
from tapes.processes import Process

SOCKET = "metrics.ipc"  # the name of the aggregator's socket in a private directory

_NAME = re.compile(r"tapes-(\d+)-(\d+)(?:-[0-9a-f]{12})?")
_MAX_GENERATIONS = 32
_GUNICORN = b"gunicorn: master"  # how the command line of gunicorn's master begins, if setproctitle sets it
_SETTLED_NANOSECONDS = 1_000_000_000  # age after which the modification time of a directory is reliable
_LISTING_SHARE = 20  # listing a directory takes at most 1/20 of the time
_ROUNDS = 2000  # number of times that a key is hashed, 2 ms in all: guessing the addresses is too slow then


class Service(NamedTuple):
    """A service: its root process, and what that is."""

    root: Process  # its root process: the process that all of its workers descend from
    description: str  # a description of that process, for the log


def this_service() -> Service:
    """Return the service that this process belongs to, as far as it can see."""
    forks.detect_fork()
    return _service_of(os.getpid())


@lru_cache(maxsize=1)
def _service_of(pid: int) -> Service:
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is not None and uwsgi.masterpid():
        return Service(processes.process_of(uwsgi.masterpid()), "uWSGI")
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    parent = multiprocessing and multiprocessing.parent_process()
    found, what = forks.this_process(), "the process itself"
    if parent is not None:
        found, what = processes.process_of(parent.pid), "multiprocessing"
    elif forks.fork_root() != found:
        found, what = forks.fork_root(), "the process that it was forked from"
    for _ in range(_MAX_GENERATIONS):
        above = _made_by(found.pid)
        if not above:
            break
        found = processes.process_of(above)
        what = "multiprocessing" if parent is not None else "the process that it was forked from"
    if "gunicorn.arbiter" in sys.modules and found.pid != pid:
        what = "gunicorn"
    return Service(found, what)


def _made_by(pid: int) -> int:
    """Return the parent of ``pid`` if both belong to one service; otherwise 0.

    A fork keeps the command line, and multiprocessing starts processes with special commands. A gunicorn that
    replaces another one (USR2) is a service of its own, although the other one started it.
    """
    parent = _parent(pid)
    if not parent or os.environ.get("GUNICORN_PID") == str(parent):
        return 0
    own, above = _command(pid), _command(parent)
    is_part = own and (own == above or b"from multiprocessing." in own or above.startswith(_GUNICORN))
    return parent if is_part else 0


def _parent(pid: int) -> int:
    return processes.stat_fields(pid, 4)[0]


def _command(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def directory_name(process: Process, parent: str) -> str:
    """Return the name, below ``parent``, of the private directory of the service of ``process``."""
    name, key = f"tapes-{process.pid}-{process.started}", _key(process)
    return f"{name}-{_hash(key + os.fsencode(parent)).hex()[:12]}" if key else name


@lru_cache(maxsize=1)
def _key(process: Process) -> bytes:
    """Return a key that only the processes of the service of ``process`` know; empty if there is none.

    A process reads the key from the root process, if it may. A process that was forked from that has
    the same addresses, and can read its own, even after it has changed its user.
    """
    key = _layout(process.pid) if processes.process_of(process.pid) == process else b""
    if not key:
        above = _command(process.pid)
        is_fork = forks.fork_root() == process or "uwsgi" in sys.modules or above.startswith(_GUNICORN)
        if is_fork or (above and above == _command(os.getpid())):
            key = _layout(os.getpid())
    for _ in range(_ROUNDS if key else 0):
        key = _hash(key)
    return key


def _hash(data: bytes) -> bytes:
    return blake2b(data).digest()


def _layout(pid: int) -> bytes:
    """Return the addresses of code, stack and heap of a process; empty if they can't be seen."""
    found = processes.stat_fields(pid, 26, 28, 47)
    return b"%d %d %d" % tuple(found) if all(found) else b""


def root_of(name: str) -> Process | None:
    """Return the root process whose directory has ``name``; ``None`` if it is not such a name."""
    match = _NAME.fullmatch(name)
    return Process(int(match[1]), int(match[2])) if match else None


def parents() -> list[str]:
    """Return the directories that may contain a private directory, the best first; they may not exist.

    Those that the environment names come first, then those that are the same for all processes of this user.
    """
    given = (
        os.environ.get("XDG_RUNTIME_DIR"),
        tempfile.tempdir or next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), None),
        "/tmp",  # noqa: S108 - the directory in it is private
        f"/run/user/{os.geteuid()}",
        "/dev/shm",  # noqa: S108
    )
    names = (os.fsdecode(parent) for parent in given if parent)
    return list(dict.fromkeys(os.path.normpath(name) for name in names if os.path.isabs(name)))


def places(process: Process) -> Iterator[str]:
    """Yield the possible paths of the aggregator's socket for the service of ``process``, the best first."""
    for parent in parents():
        yield os.path.join(parent, directory_name(process, parent), SOCKET)


def directories(process: Process, uid: int) -> Iterator[str]:
    """Yield the existing private directories of the service of ``process`` that belong to user ``uid``.

    Their names differ if the processes that made them knew another key, or none.
    """
    for parent in parents():
        for name in _names_in(parent):
            path = os.path.join(parent, name)
            if root_of(name) == process and is_private(path, uid):
                yield path


class _Listing(NamedTuple):
    names: list[str]  # of private directories in a directory
    changed: int  # modification time of the directory, in nanoseconds
    is_settled: bool  # that time was old; otherwise a later change may have the same time
    valid_until: float  # when the directory may be listed again: listing a large one is slow


_listings: dict[str, _Listing] = {}


def _names_in(parent: str) -> list[str]:
    """Return the names of private directories in ``parent``; fast, because every read needs them."""
    try:
        changed, started = os.stat(parent).st_mtime_ns, time.monotonic()
        known = _listings.get(parent)
        if known and (started < known.valid_until or (known.is_settled and known.changed == changed)):
            return known.names
        names = list(filter(_NAME.fullmatch, os.listdir(parent)))
    except OSError:
        return []
    now = time.monotonic()
    is_settled = time.time_ns() - changed > _SETTLED_NANOSECONDS
    _listings[parent] = _Listing(names, changed, is_settled, now + _LISTING_SHARE * (now - started))
    return names


def address() -> str:
    """Return the address of this service's aggregator, or of one that has just died; empty if none."""
    process, uid = this_service().root, os.geteuid()
    named = (os.path.dirname(path) for path in places(process))
    for directory in itertools.chain(filter(is_private, named), directories(process, uid)):
        path = os.path.join(directory, SOCKET)
        if os.path.lexists(path + ".lock"):
            return f"ipc://{path}"
    return ""


def is_private(directory: str, uid: int | None = None) -> bool:
    """Return whether only user ``uid`` can use ``directory``; by default, the user of this process."""
    try:
        return is_private_to(os.lstat(directory), os.geteuid() if uid is None else uid)
    except OSError:
        return False


def is_private_to(found: os.stat_result, uid: int) -> bool:
    """Return whether ``found`` describes a directory that only user ``uid`` can use."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o077
