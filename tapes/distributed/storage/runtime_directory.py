"""The private directory of a service: where it is, who may use it, and when it is removed.

Its name is derived from the root process of the service, so that all processes of the service find it, and
other users can't guess the name before the directory exists. Its mode is 0700. A directory of that name that
belongs to another user is ignored. It holds the aggregator's sockets, locks, journal and spool, and is
removed with them. `tapes.distributed.storage.sweeping` removes the directories of services that were killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tapes import service
from tapes.distributed.storage.locks import is_served
from tapes.distributed.transport.address import Endpoints, resolve
from tapes.errors import AddressError, AggregatorUnavailable
from tapes.processes import Process
from tapes.service import SOCKET

START_LOCK = ".start"  # follows the path of the socket in the name of the start lock
_PROBE = SOCKET + ".probe"


class User(NamedTuple):
    """The user that owns the files of a service."""

    uid: int
    gid: int

    @classmethod
    def ourselves(cls) -> User:
        return cls(os.geteuid(), os.getegid())


def choose_place(endpoints: Endpoints, user: User) -> Endpoints:
    """Return where the service with address ``endpoints`` meets; make its private directory if necessary.

    This is ``endpoints``, unless that is in a private directory. Such a service meets where an aggregator
    serves it, else where its directory exists, else in the first place where a directory can be made, or
    AggregatorUnavailable is raised.
    """
    if private_directory(endpoints) is None:
        return endpoints
    places, reasons = [endpoints, *other_places(endpoints, user.uid)], []
    for place in places:
        if has_aggregator(place, user.uid):
            return place
    for place in places:
        if service.is_private(os.path.dirname(place.path or ""), user.uid):
            return place
    for place in places:
        directory = os.path.dirname(place.path or "")
        try:
            _make_private(directory, user, is_new_place=True)
        except OSError as error:
            reasons.append(f"{os.path.dirname(directory)}: {error.strerror or error}")
        else:
            return place
    raise AggregatorUnavailable(
        f"there is no directory for the aggregator's sockets ({'; '.join(reasons)})",
        remedy="set XDG_RUNTIME_DIR or TMPDIR to a directory that user "
        f"{user.uid} can write to, or TAPES_ADDR to an address",
    )


def has_aggregator(place: Endpoints, uid: int | None = None) -> bool:
    """Return whether an aggregator serves ``place``; in a private directory, one of user ``uid``."""
    directory = private_directory(place)
    return (directory is None or service.is_private(directory, uid)) and is_served(place)


def current_place(endpoints: Endpoints) -> Endpoints:
    """Return where the aggregator that was at ``endpoints`` is now; ``endpoints`` if it is nowhere.

    But if the directory of that name belongs to another user, it is the next place where one can start.
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
    """Return whether the private directory of ``endpoints``, or the lock file in it, was removed."""
    exists = os.path.lexists(endpoints.lock or "") and not _is_of_another(endpoints)
    return private_directory(endpoints) is not None and not exists


def place_of(root: Process) -> Endpoints:
    """Return where the service of ``root`` meets, as far as this process can see."""
    found = _resolved(service.places(root))
    if not found:
        raise AggregatorUnavailable(
            "there is no directory for the aggregator's sockets: all paths are too long",
            remedy="set TMPDIR to a shorter path, or TAPES_ADDR to an address",
        )
    existing = _existing(root, os.geteuid())
    served = filter(has_aggregator, [*found, *existing])
    return next(itertools.chain(served, existing, filter(_is_usable, found), found))


def other_places(endpoints: Endpoints, uid: int | None = None) -> list[Endpoints]:
    """Return the other places where a service with a private directory of user ``uid`` may meet."""
    root = service.root_of(os.path.basename(private_directory(endpoints) or ""))
    if root is None:
        return []
    existing = _existing(root, os.geteuid() if uid is None else uid)
    found = dict.fromkeys([*_resolved(service.places(root)), *existing])
    return [place for place in found if place != endpoints]


def is_same_service(one: Endpoints, other: Endpoints) -> bool:
    """Return whether one service meets, or has met, at both."""
    first, second = (
        service.root_of(os.path.basename(private_directory(place) or "")) for place in (one, other)
    )
    return one == other or (first is not None and first == second)


def _existing(root: Process, uid: int) -> list[Endpoints]:
    return _resolved(os.path.join(found, SOCKET) for found in service.directories(root, uid))


def _resolved(paths: Iterable[str]) -> list[Endpoints]:
    found = []
    for path in paths:
        with contextlib.suppress(AddressError):  # the path is too long
            found.append(resolve(f"ipc://{path}"))
    return found


def _is_usable(place: Endpoints) -> bool:
    parent = os.path.dirname(os.path.dirname(place.path or ""))
    return os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK)


def _make_private(directory: str, user: User, *, is_new_place: bool = False) -> None:
    """Make a private directory if it does not exist; raises OSError if it can't be used."""
    if is_new_place and user.uid != os.geteuid() and not _is_open_to_all(os.path.dirname(directory)):
        raise PermissionError(f"it is closed to user {user.uid}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        if user != User.ourselves():
            with open_private(directory, os.geteuid()) as fd:  # no other user has replaced it
                os.fchown(fd, *user)
        if is_new_place:
            _check_room(directory)
    if not service.is_private(directory, user.uid):
        raise PermissionError(f"{directory} is not private to user {user.uid}")


def _is_of_another(endpoints: Endpoints) -> bool:
    directory = private_directory(endpoints)
    if directory is None or os.geteuid() == 0:  # root uses the directory of the user that its service runs as
        return False
    with contextlib.suppress(OSError):
        return os.lstat(directory).st_uid != os.geteuid()
    return False


def private_directory(endpoints: Endpoints) -> str | None:
    """Return the directory of ``endpoints`` if its name is that of a private directory; it may not exist."""
    if endpoints.path is not None:
        directory, name = os.path.split(endpoints.path)
        if name == SOCKET and service.root_of(os.path.basename(directory)):
            return directory
    return None


def restore(endpoints: Endpoints, user: User) -> None:
    """Make the private directory of ``endpoints`` again, if that was removed, or raise AddressError."""
    directory = private_directory(endpoints)
    if directory is not None:
        try:
            _make_private(directory, user)
        except OSError as error:
            raise AddressError(
                f"the directory of {endpoints.publish} can't be made ({error.strerror or error})",
                remedy="unset TAPES_ADDR, or set it to an address in a directory that exists",
            ) from None


def _check_room(directory: str) -> None:
    """Check that a file can be written to a new directory; if not, remove it and raise OSError."""
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
    """Yield a descriptor of a directory; raises OSError if it is not private to user ``uid``."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not service.is_private_to(os.fstat(fd), uid):
            raise PermissionError(f"{directory} is not private to user {uid}")
        yield fd
    finally:
        os.close(fd)


def clear(endpoints: Endpoints, *, files: bool = True) -> None:
    """Remove the start lock of ``endpoints``, which the caller holds, and its directory if it is private.

    Without ``files`` only an empty directory is removed.
    """
    if endpoints.path is not None:
        with contextlib.suppress(OSError):
            os.unlink(endpoints.path + START_LOCK)
    private = private_directory(endpoints)
    if private is not None:
        with contextlib.suppress(OSError):
            if files:
                remove_files(private)
            os.rmdir(private)


def remove_files(directory: str) -> None:
    """Remove the aggregator's files from a private directory of this user."""
    with open_private(directory, os.geteuid()) as fd:
        for name in os.listdir(fd):
            if name.startswith(SOCKET):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=fd)


def _is_open_to_all(directory: str) -> bool:
    parent = os.path.dirname(directory)
    is_open = bool(os.stat(directory).st_mode & stat.S_IXOTH)
    return is_open and (parent == directory or _is_open_to_all(parent))
