"""The journal: what an aggregator knows, in a file beside its socket, for the one that takes its place.

Theory. The file is replaced as a whole (a draft, then a rename), so there is always one, and it is complete.
It is written while something changes, at most once a second and for a tenth of the time, in slices, so that
whoever asks is answered meanwhile. What live workers say is cumulative, and they say it again to a new
aggregator, so it does no harm if the file is a second behind. A worker that leaves says it only once: before
it is told that it may go, its last words are appended to a second file, the *tail*. So is the name of a new
worker, as the next aggregator has to wait for everybody whose words may have been read. A new tail begins
when the totals are cut, and the former goes when these are in the file. Last words that are in both count
once, as the totals name whose they have.

There is no ``fsync``: files outlive every process, and the machine outlives none.

Its time of modification says when its aggregator lived: that sets it every 10 s, also when nothing changes. A
process of another pid namespace, as in another container, can't know by pids whether the service lives; so it
looks at the age of the files.

The socket may be in a directory where every user can make files. Those of other users are not read. Where one
has the name of a file of the journal, that gets a name with a number.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tapes.distributed.protocol.messages import (
    ALIVE_SECONDS,
    NOBODY,
    SILENT_SECONDS,
    Attach,
    Goodbye,
    Journal,
    Message,
    Record,
)
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.distributed.storage.spool import SUFFIX
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressError, WireError
from tapes.processes import Process, is_same_boot, lives, namespace_seconds

__all__ = ["JournalFile", "Saved", "read_journal"]

_JOURNAL, _DRAFT, _TAIL = ".journal", ".journal.draft", ".journal.tail-"
_MAGIC = b"tapes journal\n"
_INTERVAL_SECONDS = 1.0
_SHARE = 9
"""So many times as long as the last writing took there is none."""
_SLICE_SECONDS = 0.005
_MAX_NAMES = 10_000
"""Maximum number of names that are tried for one file."""
_NEWER_SECONDS = 10.0
"""So long after it was written the journal of a newer release is left to workers of that."""


class Saved(NamedTuple):
    """What an aggregator had written down.

    Attributes:
        hellos: Owners in other pid namespaces than that of the aggregator.
        age_seconds: How long ago anything of it was written, the last words of a worker included; negative
            if the clock was set back since.
    """

    journal: Journal
    records: list[Record]
    goodbyes: list[Goodbye]
    hellos: list[Attach]
    age_seconds: float

    def lives(self, host: str) -> bool | None:
        """Return whether a process of the service lives; ``None`` if only another namespace knows.

        Args:
            host: What pids mean here; see `tapes.processes.host_id`.
        """
        hosts = {self.journal.host, *(hello.host for hello in self.hellos)}
        processes = set(self.owners(host))
        for record in self.records:
            update = record.update
            if update.identity != NOBODY:
                hosts.add(update.host)
                processes.update([update.process] if update.host == host else ())
        if any(map(lives, processes)):
            return True
        is_of_this_namespace = hosts == {host} and self.age_seconds <= namespace_seconds()
        return False if is_of_this_namespace else None

    def is_of_living_service(self, host: str) -> bool:
        """Return whether the service goes on, so that a new aggregator on ``host`` takes its journal over.

        What can't be known by pids counts as alive for as long as a silent worker does. That does not hold
        for what was written before the machine was started.
        """
        living = self.lives(host)
        if living is None:
            return is_same_boot(self.journal.host, host) and self.age_seconds < SILENT_SECONDS
        return living

    def owners(self, host: str) -> list[Process]:
        """Return the processes of ``host`` that the aggregator served."""
        owners = list(self.journal.owners) if self.journal.host == host else []
        return owners + [
            process for hello in self.hellos if hello.host == host for process in hello.processes
        ]


class JournalFile:
    """The files of a journal; there are none where the address is no file.

    Args:
        endpoints: Beside which socket.
        pages: Returns everything to be written, one message at a time: records of the living, and then the
            `Journal` with the total of those that left, cut at once.
        failed: Called with what keeps it from being written.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        pages: Callable[[], Iterable[Message]],
        failed: Callable[[Exception], None],
    ) -> None:
        self._base = endpoints.path
        self._pages = pages
        self._failed = failed
        self._changed = False
        self._due = self._ended = self._spent = self._shown = 0.0
        self._writing: Iterator[None] | None = None
        self._tail = -1
        self._tails: list[str] = []
        self._written = ""

    def read(self) -> Saved | None:
        """Return what the aggregator before this one left; ``None`` if that is nothing.

        Raises:
            WireError: If it can't be read.
            AddressError: If the file is not one of ours, or was just written by a newer release, one of whose
                workers is to start the next one.
        """
        if self._base is None:
            return None
        self._tails = _tails_of(self._base)
        try:
            return read_journal(self._base)
        except AddressError:
            self._base = None  # to be left alone
            raise

    def changed(self, *, urgent: bool = False) -> None:
        """Note that there is something to be written: within a second, or as soon as may be."""
        self._changed = True
        if urgent:
            self._due = min(self._due, self._ended + _SHARE * self._spent)

    def note(self, message: bytes) -> None:
        """Write down the last words of a worker, or that there is a new one, now."""
        if self._base is None:
            return
        self._changed = True
        try:
            if self._tail >= 0 and not os.fstat(self._tail).st_nlink:  # it was removed
                self.look_after_files()
            if self._tail < 0:
                path = f"{self._base}{_TAIL}{time.monotonic_ns():020}"
                self._tail = _create(path, os.O_APPEND)
                self._tails.append(path)
            begins = b"" if os.fstat(self._tail).st_size else _MAGIC
            _write(self._tail, begins + _frame(message))
        except OSError as error:
            self._failed(error)

    def look_after_files(self) -> None:
        """Write everything again, as soon as may be, if a file of it was removed; call it now and then."""
        there = list(filter(os.path.lexists, self._tails))
        if there != self._tails or (self._written and not os.path.lexists(self._written)):
            self._begin_anew(there)

    def _begin_anew(self, tails: list[str]) -> None:
        self.close()
        self._tails, self._written = tails, ""
        self.changed(urgent=True)

    def step(self, now: float) -> bool:
        """Write a slice, if it is time; return whether there is more to be written at once."""
        self._show_life()
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

    def _show_life(self) -> None:
        """Set the time of the file now and then."""
        now = time.monotonic()
        if self._base is not None and now - self._shown >= ALIVE_SECONDS:
            self._shown = now
            with contextlib.suppress(OSError):  # there is none yet, or it was removed
                os.utime(_journal_of(self._base), follow_symlinks=False)

    def finish(self) -> bool:
        """Write everything now; return whether that could be done."""
        while self.step(float("inf")):
            pass
        self._changed = True
        while self.step(float("inf")):
            pass
        return not self._changed

    def settle(self, endpoints: Endpoints) -> None:
        """Write everything beside ``endpoints``, as soon as may be: the files were removed."""
        self._base = endpoints.path
        self._begin_anew([])

    def remove(self) -> None:
        """Remove the files: nobody will take this aggregator's place."""
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
        if self._tail >= 0:
            os.close(self._tail)
            self._tail = -1

    def _write(self, base: str) -> Iterator[None]:
        """Write everything, a message a step."""
        draft, merged = _usable(base + _DRAFT), 0
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)  # of one that was killed meanwhile
        fd = _create(draft)
        try:
            _write(fd, _MAGIC)
            for page in self._pages():
                if isinstance(page, Journal):  # what is noted from now on is not in it
                    merged = len(self._tails)
                    if self._tail >= 0:
                        os.close(self._tail)
                        self._tail = -1
                _write(fd, _frame(encode(page)))
                yield
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
    """Return what is written beside the socket ``base``; see `JournalFile.read`."""
    whole = _journal_of(base)
    _make_way_for_newer(whole)
    journal = None
    records: list[Record] = []
    goodbyes: list[Goodbye] = []
    hellos: list[Attach] = []
    for path in (whole, *_tails_of(base)):
        for data in _frames(path):
            message = decode(data)
            if isinstance(message, Journal):
                journal = message
            elif isinstance(message, Record):
                records.append(message)
            elif isinstance(message, Goodbye):
                goodbyes.append(message)
            elif isinstance(message, Attach):
                hellos.append(message)
    if journal is not None:
        return Saved(journal, records, goodbyes, hellos, _age_of(base))
    if records or goodbyes:
        raise WireError("the journal is not complete")
    return None


def _age_of(base: str) -> float:
    """Return the seconds since a file beside ``base`` that outlives its aggregator was written."""
    written = []
    for path in (_journal_of(base), *_tails_of(base), *_ours(glob.glob(glob.escape(base + SUFFIX) + "*"))):
        with contextlib.suppress(OSError):
            written.append(os.lstat(path).st_mtime)
    return time.time() - max(written, default=0.0)


def _make_way_for_newer(path: str) -> None:
    version = next((data[1] for data in _frames(path) if len(data) > 1), VERSION)
    if version > VERSION and abs(time.time() - os.stat(path).st_mtime) < _NEWER_SECONDS:
        raise AddressError(
            "the aggregator that was here is of a newer release",
            got=version,
            expected=f"a journal of version {VERSION} or {VERSION - 1}",
            remedy="a worker of that release starts the next one; without one, what it knew is lost",
        )


def _tails_of(base: str) -> list[str]:
    return sorted(_ours(glob.glob(glob.escape(base + _TAIL) + "*")))


def _journal_of(base: str) -> str:
    """Return the path of the journal that is there, or that of one to be written."""
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
    """Return those of ``paths`` that are there and belong to this user."""
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
    """Write all of ``data``, or nothing of it."""
    length = os.fstat(fd).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.ftruncate(fd, length)
        raise


def _frames(path: str) -> Iterator[bytes]:
    """Yield the messages in a file; not a last one that is cut short."""
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
                f"the aggregator can't write {path}: it is somebody's file",
                remedy="choose another address, or remove that file",
            )
        while (size := int.from_bytes(file.read(8), "big")) and size <= found.st_size - file.tell():
            yield file.read(size)
