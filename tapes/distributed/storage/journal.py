"""The journal: what an aggregator knows, in a file beside its socket, for its successor.

Theory. The file is replaced as a whole (a draft, then a rename), so there is always a complete one. It is
written while something changes, at most once a second and for a tenth of the time, in slices, so that the
aggregator answers meanwhile. Live workers send their cumulative states again to a new aggregator, so it does
no harm if the file is a second behind. Other messages come only once, and are appended to a second file, the
*tail*, before they have an effect: the last update of a worker before it is acknowledged, and the move of a
cursor before its packet is sent. A new worker is appended, too, as the successor has to wait for everyone
whose counts may have been read. A new tail begins before the totals are cut, and the former one is removed
when these are in the file. So a message can be in both, which does no harm: the totals name the workers that
they include, and the last move of a cursor counts.

There is no ``fsync``: files outlive every process, and none outlives the machine.

The aggregator sets the file's time of modification every 10 s, also when nothing changes. A process of
another pid namespace, as in another container, can't check by pids whether the service lives; so it looks at
the age of the files.

The socket may be in a directory where every user can make files. Files of other users are not read. If
another user has a file with the name that the journal needs, the name gets a number.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tapes.distributed.protocol.messages import (
    HEARTBEAT_SECONDS,
    HEARTBEAT_TIMEOUT_SECONDS,
    Attach,
    Cursor,
    Goodbye,
    Item,
    Journal,
    Message,
    Record,
    Retired,
)
from tapes.distributed.protocol.wire import READABLE, VERSION, decode, encode
from tapes.distributed.storage.spool import SUFFIX
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressError, WireError
from tapes.naming import Labels
from tapes.processes import Process, is_same_boot, lives, namespace_seconds
from tapes.sums import Number

__all__ = ["JournalFile", "Saved", "read_journal"]

_JOURNAL, _DRAFT, _TAIL = ".journal", ".journal.draft", ".journal.tail-"
_MAGIC = b"tapes journal\n"
_NONE = Journal("", (), (), 0, (), {}, 1)
_INTERVAL_SECONDS = 1.0
_SHARE = 9
"""Minimum pause after a write, in times of its duration: writes take at most 1/10 of the time."""
_SLICE_SECONDS = 0.005
_MAX_NAMES = 10_000
"""Maximum number of names that are tried for one file."""
_NEWER_SECONDS = 10.0
"""Age up to which the journal of a newer release is left alone, as a worker of that release may need it."""


class Saved(NamedTuple):
    """The journal of an aggregator.

    Attributes:
        retired: The totals of exited workers.
        attached: Owners in other pid namespaces than that of the aggregator.
        cursors: By receiver and series, what was sent; see `tapes.reporting.cursor.Sent`.
        age_seconds: Seconds since anything of it was written; negative if the clock was set back since.
    """

    journal: Journal
    records: list[Record]
    retired: list[Item]
    goodbyes: list[Goodbye]
    attached: list[Attach]
    cursors: dict[str, dict[tuple[str, Labels], tuple[Number, Number, Number]]]
    age_seconds: float

    def lives(self, host: str) -> bool | None:
        """Return whether a process of the service lives; ``None`` if that can't be checked from here.

        Args:
            host: The pid namespace of this process; see `tapes.processes.host_id`.
        """
        hosts = {self.journal.host, *(attach.host for attach in self.attached)}
        processes = set(self.owners(host))
        for record in self.records:
            update = record.update
            hosts.add(update.host)
            processes.update([update.process] if update.host == host else ())
        if any(map(lives, processes)):
            return True
        is_of_this_namespace = hosts == {host} and self.age_seconds <= namespace_seconds()
        return False if is_of_this_namespace else None

    def is_of_living_service(self, host: str) -> bool:
        """Return whether the service goes on, so that a new aggregator on ``host`` takes over its journal.

        If that can't be checked by pids, it counts as alive until the heartbeat timeout, unless the machine
        was restarted since.
        """
        living = self.lives(host)
        if living is None:
            return is_same_boot(self.journal.host, host) and self.age_seconds < HEARTBEAT_TIMEOUT_SECONDS
        return living

    def owners(self, host: str) -> list[Process]:
        """Return the processes of ``host`` that the aggregator served."""
        owners = list(self.journal.owners) if self.journal.host == host else []
        return owners + [
            process for attach in self.attached if attach.host == host for process in attach.processes
        ]


class JournalFile:
    """The files of a journal; there are none if the address is no file.

    `append` is safe from any thread; everything else belongs to the aggregator's loop.

    Args:
        endpoints: Beside which socket.
        living: Returns the records of live workers.
        totals: Returns everything else; it is called after `living` is written, and cut at once.
        failed: Called with errors of writing.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        living: Callable[[], Iterable[Message]],
        totals: Callable[[], Iterable[Message]],
        failed: Callable[[Exception], None],
    ) -> None:
        self._base = endpoints.path
        self._living = living
        self._totals = totals
        self._failed = failed
        self._changed = False
        self._due = self._ended = self._spent = self._shown = 0.0
        self._writing: Iterator[None] | None = None
        self._appending = threading.Lock()
        self._tail = -1
        self._tails: list[str] = []
        self._written = ""

    def read(self) -> Saved | None:
        """Return the journal of the aggregator before this one; ``None`` if there is none.

        Raises:
            WireError: If it can't be read. AddressError: If the file is not one of ours, or was just written
            by a newer release, whose workers
                will start the next aggregator.
        """
        if self._base is None:
            return None
        self._tails = _tails_of(self._base)
        try:
            return read_journal(self._base)
        except AddressError:
            self._base = None  # leave it alone
            raise

    def changed(self, *, urgent: bool = False) -> None:
        """Have the journal written: within a second, or as soon as possible if it is urgent."""
        self._changed = True
        if urgent:
            self._due = min(self._due, self._ended + _SHARE * self._spent)

    def append(self, message: bytes) -> bool:
        """Append a message to the tail; return whether it is there, or there is no journal."""
        if self._base is None:
            return True
        self._changed = True
        try:
            with self._appending:
                if self._tail >= 0 and not os.fstat(self._tail).st_nlink:  # removed
                    self._close_tail()
                if self._tail < 0:
                    path = f"{self._base}{_TAIL}{time.monotonic_ns():020}"
                    self._tail = _create(path, os.O_APPEND)
                    self._tails.append(path)
                begins = b"" if os.fstat(self._tail).st_size else _MAGIC
                _write(self._tail, begins + _frame(message))
        except OSError as error:
            self._failed(error)
            return False
        return True

    def look_after_files(self) -> None:
        """Write everything again, as soon as possible, if one of the files was removed; call it regularly."""
        with self._appending:
            present = list(filter(os.path.lexists, self._tails))
            if present == self._tails and (not self._written or os.path.lexists(self._written)):
                return
        self._begin_anew(present)

    def _begin_anew(self, tails: list[str]) -> None:
        with self._appending:
            self._close_tail()
            self._tails, self._written = tails, ""
        self._writing = None
        self.changed(urgent=True)

    def step(self, now: float) -> bool:
        """Write a slice, if one is due; return whether the next one is due at once."""
        self._set_time()
        if self._base is None or (self._writing is None and not (self._changed and now >= self._due)):
            return False
        if self._writing is None:
            self._changed, self._spent = False, 0.0
            self._writing = self._write(self._base)
        started = now = time.monotonic()
        try:
            while now - started < _SLICE_SECONDS:
                next(self._writing)
                now = time.monotonic()
        except StopIteration:
            self._writing = None
        except Exception as error:  # the disk is full, or a record too long
            self._writing, self._changed = None, True
            self._failed(error)
        self._ended = time.monotonic()
        self._spent += self._ended - started
        self._due = self._ended + max(_INTERVAL_SECONDS, _SHARE * self._spent)
        return self._writing is not None

    def _set_time(self) -> None:
        """Set the file's time of modification, now and then."""
        now = time.monotonic()
        if self._base is not None and now - self._shown >= HEARTBEAT_SECONDS:
            self._shown = now
            with contextlib.suppress(OSError):  # there is none yet, or it was removed
                os.utime(_journal_of(self._base), follow_symlinks=False)

    def finish(self) -> bool:
        """Write everything now; return whether that was possible."""
        while self.step(float("inf")):
            pass
        self._changed = True
        while self.step(float("inf")):
            pass
        return not self._changed

    def settle(self, endpoints: Endpoints) -> None:
        """Write everything beside ``endpoints``, as soon as possible: the files were removed."""
        self._base = endpoints.path
        self._begin_anew([])

    def remove(self) -> None:
        """Remove the files: there will be no successor."""
        self.close()
        self._written = ""
        if self._base is not None:
            for path in (*_named(self._base + _JOURNAL), *_named(self._base + _DRAFT), *self._tails):
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self._tails = []

    def close(self) -> None:
        """Stop writing, and leave the files."""
        self._writing = None
        with self._appending:
            self._close_tail()

    def _close_tail(self) -> None:
        if self._tail >= 0:
            os.close(self._tail)
            self._tail = -1

    def _write(self, base: str) -> Iterator[None]:
        """Write everything, a message a step."""
        draft = _usable(base + _DRAFT)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)  # of an aggregator that was killed meanwhile
        fd = _create(draft)
        try:
            # 1. Live workers: the totals have those of them that exit meanwhile.
            _write(fd, _MAGIC)
            for message in self._living():
                _write(fd, _frame(encode(message)))
                yield
            # 2. A new tail begins: the totals have everything in the former ones.
            with self._appending:
                self._close_tail()
                merged = len(self._tails)
            # 3. The totals.
            for message in self._totals():
                _write(fd, _frame(encode(message)))
                yield
            # 4. The draft becomes the journal.
            path = _usable(base + _JOURNAL)
            os.replace(draft, path)
            self._written = path
            for former in (*_named(base + _JOURNAL), *self._tails[:merged]):
                if former != path:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(former)
            del self._tails[:merged]
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        finally:
            os.close(fd)


def read_journal(base: str) -> Saved | None:
    """Return the journal beside the socket ``base``; see `JournalFile.read`."""
    path = _journal_of(base)
    _make_way_for_newer(path)
    saved = Saved(_NONE, [], [], [], [], {}, _age_of(base))
    for data in (data for path in (path, *_tails_of(base)) for data in _frames(path)):
        message = decode(data)
        if isinstance(message, Journal):
            saved = saved._replace(journal=message)
        elif isinstance(message, Record):
            saved.records.append(message)
        elif isinstance(message, Retired):
            saved.retired.extend(message.items)
        elif isinstance(message, Goodbye):
            saved.goodbyes.append(message)
        elif isinstance(message, Attach):
            saved.attached.append(message)
        elif isinstance(message, Cursor):
            sent = saved.cursors.setdefault(message.target, {})
            for count in message.counts:
                if count.sent is None:
                    sent.pop((count.name, count.labels), None)
                else:
                    sent[count.name, count.labels] = count.sent
    if saved.journal is not _NONE:
        return saved
    if saved.records or saved.goodbyes:
        raise WireError("the journal is not complete")
    return None


def _age_of(base: str) -> float:
    """Return the seconds since the last write of a file beside ``base`` that outlives its aggregator."""
    written = []
    for path in (_journal_of(base), *_tails_of(base), *_ours(glob.glob(glob.escape(base + SUFFIX) + "*"))):
        with contextlib.suppress(OSError):
            written.append(os.lstat(path).st_mtime)
    return time.time() - max(written, default=0.0)


def _make_way_for_newer(path: str) -> None:
    version = next((data[1] for data in _frames(path) if len(data) > 1), VERSION)
    if version > VERSION and abs(time.time() - os.stat(path).st_mtime) < _NEWER_SECONDS:
        raise AddressError(
            "the last aggregator at this address is of a newer release",
            got=version,
            expected="a journal of version " + " or ".join(map(str, READABLE)),
            remedy="a worker of that release starts the next one; without one, its counts are lost",
        )


def _tails_of(base: str) -> list[str]:
    return sorted(_ours(glob.glob(glob.escape(base + _TAIL) + "*")))


def _journal_of(base: str) -> str:
    """Return the path of the existing journal, or of one to be written."""
    return max(_named(base + _JOURNAL), key=os.path.getmtime, default=_usable(base + _JOURNAL))


def _named(path: str) -> list[str]:
    """Return the files of this user with the name ``path``, without or with a number."""
    return _ours([path, *glob.glob(glob.escape(path) + ".[0-9]*")])


def _usable(path: str) -> str:
    """Return ``path``, with a number if another user has made a file of that name."""
    for number in range(1, _MAX_NAMES):
        name = f"{path}.{number}" if number > 1 else path
        if not os.path.lexists(name) or _ours([name]):
            return name
    return path


def _ours(paths: Iterable[str]) -> list[str]:
    """Return those of ``paths`` that exist and belong to this user."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_uid == os.geteuid():
                found.append(path)
    return found


def _create(path: str, flags: int = 0) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


def _write(fd: int, data: bytes) -> None:
    """Write all of ``data``, or none of it."""
    length = os.fstat(fd).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.ftruncate(fd, length)
        raise


def _frames(path: str) -> Iterator[bytes]:
    """Yield the messages in a file, except for an incomplete last one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        raise WireError(f"the journal can't be read ({error.strerror})") from None
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not is_ours or (file.read(len(_MAGIC)) != _MAGIC and found.st_size):
            raise AddressError(
                f"the aggregator can't write {path}: the file is not a journal of this user",
                remedy="choose another address, or remove that file",
            )
        while (size := int.from_bytes(file.read(8), "big")) and size <= found.st_size - file.tell():
            yield file.read(size)
