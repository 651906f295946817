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

The aggregator sets the file's time of modification every 10 s, even when nothing changes. A process of
another pid namespace, as in another container, can't check by pids whether the service lives; so it looks at
the age of the files.

`.saved_journal` has the format of the files.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from tapes.distributed.protocol.messages import HEARTBEAT_SECONDS, Message
from tapes.distributed.protocol.wire import encode
from tapes.distributed.storage import saved_journal
from tapes.distributed.storage.saved_journal import DRAFT, JOURNAL, MAGIC, TAIL, named, usable
from tapes.distributed.transport.address import Endpoints
from tapes.errors import AddressError

_Messages = Callable[[], Iterable[Message]]

_INTERVAL_SECONDS = 1.0
_SHARE = 9  # minimum pause after a write, in times of its duration: writes take at most 1/10 of the time
_SLICE_SECONDS = 0.005  # maximum seconds of one slice


class JournalFile:
    """The files of a journal; there are none if the address is not a file.

    `append` is safe from any thread; everything else belongs to the aggregator's loop.

    Args:
        living: Returns the records of live workers.
        totals: Returns everything else; it is called after `living` is written, and cut at once.
        failed: Called with errors of writing.
    """

    def __init__(
        self, endpoints: Endpoints, living: _Messages, totals: _Messages, failed: Callable[[Exception], None]
    ) -> None:
        self._base = endpoints.path
        self._living, self._totals, self._failed = living, totals, failed
        self._changed = self._is_complete = False
        self._due = self._ended = self._spent = self._shown = 0.0
        self._writing: Iterator[None] | None = None
        self._appending = threading.Lock()
        self._tail = -1
        self._tails: list[str] = []
        self._written = ""

    def read(self) -> saved_journal.Saved | None:
        """Return the journal of the aggregator before this one; ``None`` if there is none.

        Raises `WireError` if it can't be read. Raises `AddressError` if the file is not one of ours, or was
        just written by a newer release, whose workers will start the next aggregator.
        """
        if self._base is None:
            return None
        self._tails = saved_journal.tails_of(self._base)
        try:
            return saved_journal.read_journal(self._base)
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
                    path = f"{self._base}{TAIL}{time.monotonic_ns():020}"
                    self._tail = _create(path, os.O_APPEND)
                    self._tails.append(path)
                begins = b"" if os.fstat(self._tail).st_size else MAGIC
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
            self._writing, self._is_complete = None, True
        except Exception as error:  # the disk is full, or a record too long
            self._writing, self._changed = None, True
            self._failed(error)
        self._ended = time.monotonic()
        self._spent += self._ended - started
        self._due = self._ended + max(_INTERVAL_SECONDS, _SHARE * self._spent)
        return self._writing is not None

    def _set_time(self) -> None:
        now = time.monotonic()
        if self._base is not None and now - self._shown >= HEARTBEAT_SECONDS:
            self._shown = now
            with contextlib.suppress(OSError):  # there is none yet, or it was removed
                os.utime(saved_journal.journal_of(self._base), follow_symlinks=False)

    def finish(self) -> bool:
        """Write everything now; return whether that was possible."""
        while self.step(float("inf")):
            pass
        self._changed, self._is_complete = True, False
        while self.step(float("inf")):
            pass
        return self._is_complete  # reporters may have changed something since

    def settle(self, endpoints: Endpoints) -> None:
        """Write everything beside ``endpoints``, as soon as possible: the files were removed."""
        self._base = endpoints.path
        self._begin_anew([])

    def remove(self) -> None:
        self.close()
        self._written = ""
        if self._base is not None:
            for path in (*named(self._base + JOURNAL), *named(self._base + DRAFT), *self._tails):
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self._tails = []

    def close(self) -> None:
        self._writing = None
        with self._appending:
            self._close_tail()

    def _close_tail(self) -> None:
        if self._tail >= 0:
            os.close(self._tail)
            self._tail = -1

    def _write(self, base: str) -> Iterator[None]:
        """Write everything, a message a step."""
        draft = usable(base + DRAFT)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)  # of an aggregator that was killed meanwhile
        fd = _create(draft)
        try:
            # 1. Live workers: the totals have those of them that exit meanwhile.
            _write(fd, MAGIC)
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
            path = usable(base + JOURNAL)
            os.replace(draft, path)
            self._written = path
            for former in (*named(base + JOURNAL), *self._tails[:merged]):
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
