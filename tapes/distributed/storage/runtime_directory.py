"""The private directory of a service: where it is, who may use it, and how it goes.

It is named after the supervisor of the service, so that all its processes find it, and no other user knows
its name before it is there; mode 0700. What has its name and belongs to another user is ignored. It holds the
aggregator's sockets, its locks and wills, and is removed with them. `.sweeping` removes
what a service leaves that was killed outright.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tapes import forks, service
from tapes.distributed.storage.locks import is_served, unlock
from tapes.distributed.transport.address import Endpoints, resolve
from tapes.errors import AddressError, AggregatorUnavailable
from tapes.processes import Process
from tapes.service import SOCKET

__all__ = [
    "START_LOCK", "User", "choose_place", "clear", "current_place", "has_aggregator", "is_removed",
    "is_same_service", "open_private", "other_places", "place_of", "remove_files", "restore", "start_lock",
]  # fmt: skip

START_LOCK = ".start"
"""How the name of the lock of those who start an aggregator ends."""
_PROBE = SOCKET + ".probe"
_PATIENCE_SECONDS = 20.0


class User(NamedTuple):
    """Whom the files of a service belong to."""

    uid: int
    gid: int

    @classmethod
    def ourselves(cls) -> User:
        """Return the user of this process."""
        return cls(os.geteuid(), os.getegid())


def choose_place(endpoints: Endpoints, user: User) -> Endpoints:
    """Return where a service meets that is to meet at ``endpoints``; a private directory is made if need be.

    That is there, but for a private directory: such a service meets wherever it is served by now, and if it
    is served nowhere, where there is room for it.

    Raises:
        AggregatorUnavailable: If there is no place for it.
    """
    directory = _owned(endpoints)
    if directory is None:
        return endpoints
    places = [endpoints, *other_places(endpoints, user.uid)]
    for place in places:
        if has_aggregator(place, user.uid):
            return place
    for place in places:
        if service.is_private(os.path.dirname(place.path or ""), user.uid):
            return place
    reasons = []
    for place in places:
        why_not = _make_private(os.path.dirname(place.path or ""), user)
        if not why_not:
            return place
        reasons.append(why_not)
    raise AggregatorUnavailable(
        f"there is no directory for the aggregator's sockets ({'; '.join(reasons)})",
        remedy="set XDG_RUNTIME_DIR or TMPDIR to a directory that user "
        f"{user.uid} can write to, or TAPES_ADDR to an address",
    )


def has_aggregator(place: Endpoints, uid: int | None = None) -> bool:
    """Return whether an aggregator serves ``place``; in a private directory, one of user ``uid``."""
    directory = _owned(place)
    return (directory is None or service.is_private(directory, uid)) and is_served(place)


def current_place(endpoints: Endpoints) -> Endpoints:
    """Return where the aggregator is by now that was to be at ``endpoints``.

    If it can't be found, these; or, where another user has made a directory of that name, where it may come.
    """
    if endpoints.path is None:
        return endpoints
    is_of_another = _is_of_another(endpoints)
    if os.path.lexists(endpoints.path) and not is_of_another:
        return endpoints
    others = other_places(endpoints)
    possible = (place for place in others if is_of_another and not _is_of_another(place))
    return next(filter(has_aggregator, others), next(possible, endpoints))


def is_removed(endpoints: Endpoints) -> bool:
    """Return whether the private directory of ``endpoints``, or what an aggregator keeps in it, is gone."""
    is_there = os.path.lexists(endpoints.lock or "") and not _is_of_another(endpoints)
    return _owned(endpoints) is not None and not is_there


def place_of(supervisor: Process) -> Endpoints:
    """Return where the service of ``supervisor`` is to meet, as seen by this process.

    Raises:
        AggregatorUnavailable: If all paths are too long.
    """
    found = _resolved(service.places(supervisor))
    if not found:
        raise AggregatorUnavailable(
            "there is no directory for the aggregator's sockets: all paths are too long",
            remedy="set TMPDIR to a shorter path, or TAPES_ADDR to an address",
        )
    there = _there(supervisor, os.geteuid())
    usable = (place for place in found if _is_usable(os.path.dirname(os.path.dirname(place.path or ""))))
    return next(filter(has_aggregator, [*found, *there]), next(iter(there), next(usable, found[0])))


def other_places(endpoints: Endpoints, uid: int | None = None) -> list[Endpoints]:
    """Return the other places in which a service may meet that has a private directory of ``uid``."""
    supervisor = service.supervisor_of(os.path.basename(_owned(endpoints) or ""))
    if supervisor is None:
        return []
    there = _there(supervisor, os.geteuid() if uid is None else uid)
    found = dict.fromkeys([*_resolved(service.places(supervisor)), *there])
    return [place for place in found if place != endpoints]


def _there(supervisor: Process, uid: int) -> list[Endpoints]:
    return _resolved(os.path.join(found, SOCKET) for found in service.directories(supervisor, uid))


def is_same_service(one: Endpoints, other: Endpoints) -> bool:
    """Return whether both are where one service meets, or has met before it moved."""
    first, second = (service.supervisor_of(os.path.basename(_owned(place) or "")) for place in (one, other))
    return one == other or (first is not None and first == second)


def _resolved(paths: Iterable[str]) -> list[Endpoints]:
    found = []
    for path in paths:
        with contextlib.suppress(AddressError):  # too long
            found.append(resolve(f"ipc://{path}"))
    return found


def _is_usable(parent: str) -> bool:
    return os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK)


def _make_private(directory: str, user: User) -> str:
    """Make a private directory, if it is not there; return why it can't be used, or nothing."""
    parent = os.path.dirname(directory)
    try:
        if user.uid != os.geteuid() and not _open_to_all(parent):
            return f"{parent} is closed to user {user.uid}"
        with contextlib.suppress(FileExistsError):
            _make(directory, user)
            _check_room(directory)
        found = os.lstat(directory)
    except OSError as error:
        return f"{parent}: {error.strerror or error}"
    return "" if service.is_private_to(found, user.uid) else f"{directory} belongs to others too"


def _is_of_another(endpoints: Endpoints) -> bool:
    """Return whether what has the name of the private directory of ``endpoints`` belongs to another user."""
    directory = _owned(endpoints)
    if directory is None or os.geteuid() == 0:  # root meets with whichever user its service runs as
        return False
    with contextlib.suppress(OSError):
        return os.lstat(directory).st_uid != os.geteuid()
    return False


def _owned(endpoints: Endpoints) -> str | None:
    """Return the directory of ``endpoints`` if it is of the kind that this module makes, there or not."""
    if endpoints.path is not None:
        directory, name = os.path.split(endpoints.path)
        if name == SOCKET and service.supervisor_of(os.path.basename(directory)):
            return directory
    return None


def restore(endpoints: Endpoints, user: User) -> None:
    """Make the private directory of ``endpoints`` again if it is one, and gone.

    Raises:
        AddressError: If that can't be done, or another user has made it.
    """
    directory = _owned(endpoints)
    if directory is not None:
        try:
            with contextlib.suppress(FileExistsError):
                _make(directory, user)
            if not service.is_private(directory, user.uid):
                raise PermissionError(f"{directory} belongs to others too")
        except OSError as error:
            raise AddressError(
                f"the directory of {endpoints.publish} can't be made ({error.strerror or error})",
                remedy="unset TAPES_ADDR, or set it to an address in a directory that exists",
            ) from None


def _make(directory: str, user: User) -> None:
    os.mkdir(directory, 0o700)
    if user != User.ourselves():
        with open_private(directory, os.geteuid()) as fd:  # no other user can have replaced it
            os.fchown(fd, *user)


def _check_room(directory: str) -> None:
    """Check that a new directory takes files with something in them; removes it if it does not.

    Raises:
        OSError: If it does not, as where the file system is full.
    """
    path = os.path.join(directory, _PROBE)
    try:
        with open(path, "xb") as file:
            file.write(b"tapes")
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        raise
    os.unlink(path)


@contextlib.contextmanager
def open_private(directory: str, uid: int) -> Iterator[int]:
    """Yield a descriptor of a directory that is private to ``uid``; raises OSError if it is none."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not service.is_private_to(os.fstat(fd), uid):
            raise PermissionError(f"{directory} belongs to others too")
        yield fd
    finally:
        os.close(fd)


def clear(endpoints: Endpoints, *, files: bool = True) -> None:
    """Remove the start lock of ``endpoints``, and its directory if it is a private one; hold that lock.

    Args:
        endpoints: Where an aggregator was, or could not be started.
        files: Remove what is in the directory too; otherwise only an empty one goes.
    """
    if endpoints.path is not None:
        with contextlib.suppress(OSError):
            os.unlink(endpoints.path + START_LOCK)
    private = _owned(endpoints)
    if private is not None:
        with contextlib.suppress(OSError):
            if files:
                remove_files(private)
            os.rmdir(private)


def remove_files(directory: str) -> None:
    """Remove the files of an aggregator in a private directory of ours."""
    with open_private(directory, os.geteuid()) as fd:
        for name in os.listdir(fd):
            if name.startswith(SOCKET):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=fd)


@contextlib.contextmanager
def start_lock(endpoints: Endpoints, user: User, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of those who start or end the aggregator at ``endpoints``; yield whether it is held.

    Waits for 20 s at most, as whoever holds it may have been stopped. Where there is no file, as for TCP,
    there is no lock either: the kernel lets one aggregator bind. Nor is there one where another user has made
    its file: then several may start an aggregator at once, and the lock of the aggregators lets one serve.

    Raises:
        AddressError: If there is no directory for it.
        AggregatorUnavailable: If it can't be had in time.
    """
    if endpoints.path is None:
        yield True
        return
    path = endpoints.path + START_LOCK
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # removed with its directory by an aggregator that left meanwhile
            if not wait or _owned(endpoints) is None:
                raise AddressError(
                    f"there is no directory for {endpoints.publish}",
                    remedy="choose a directory that exists and can be written to",
                ) from None
            restore(endpoints, user)
            continue
        except OSError as error:
            if _is_strangers(path, user):
                yield True
                return
            raise AddressError(
                f"the aggregator can't be started at {endpoints.publish} ({error.strerror or error})",
                remedy="choose a directory that exists and can be written to",
            ) from None
        _held.add(fd)
        try:
            if _is_strangers(fd, user):
                yield True
                return
            if user != User.ourselves():
                found = os.fstat(fd)  # which may be a link that the user made
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid():
                    os.fchown(fd, *user)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    yield True
                    return
        except BlockingIOError:
            if not wait:
                yield False
                return
            if time.monotonic() > deadline:
                raise AggregatorUnavailable(
                    f"somebody began to start the aggregator at {endpoints.publish} and doesn't end",
                    remedy=f"see which process has {path} open",
                ) from None
            time.sleep(0.01)  # there is nothing else to wait on that has an end
        finally:
            if fd in _held:  # not in a child that was forked meanwhile
                _held.discard(fd)
                unlock(fd)


def _is_strangers(file: str | int, user: User) -> bool:
    """Return whether a file belongs neither to the user of this process nor to ``user``."""
    found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    return found.st_uid not in (os.geteuid(), user.uid)


def _let_go() -> None:
    """In a forked child, close what would hold a lock of its parent should that be killed."""
    while _held:
        os.close(_held.pop())


_held: set[int] = set()
forks.renew_in_child(_let_go)


def _open_to_all(directory: str) -> bool:
    """Return whether every user can reach what is in ``directory``."""
    while True:
        if not os.stat(directory).st_mode & stat.S_IXOTH:
            return False
        if directory == os.path.dirname(directory):
            return True
        directory = os.path.dirname(directory)
