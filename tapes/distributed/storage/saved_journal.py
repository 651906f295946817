"""A journal as it was saved: the names of its files, their format, and what is in them; see `.journal`.

A file begins with `MAGIC`; each message follows its length in 8 bytes.

The socket may be in a directory where every user can make files. Files of other users are not read. If
another user has a file with the name that the journal needs, the name gets a number.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tapes.distributed.protocol import messages
from tapes.distributed.protocol.messages import Item, Journal
from tapes.distributed.protocol.wire import READABLE, VERSION, decode
from tapes.distributed.storage.spool import SUFFIX
from tapes.errors import AddressError, WireError
from tapes.naming import Labels
from tapes.processes import is_same_boot, lives, namespace_seconds
from tapes.sums import Number

JOURNAL, DRAFT, TAIL = ".journal", ".journal.draft", ".journal.tail-"
MAGIC = b"tapes journal\n"
_NONE = Journal("", (), (), 0, (), {}, 1)
_MAX_NAMES = 10_000  # maximum number of names that are tried for one file
_NEWER_SECONDS = 10.0
"""Age up to which the journal of a newer release is left alone, as a worker of that release may need it."""


class Saved(NamedTuple):
    """The journal of an aggregator.

    Attributes:
        attached: Owners in other pid namespaces than that of the aggregator.
        cursors: By receiver and series, what was sent; see `tapes.reporting.cursor.Sent`.
        age_seconds: Seconds since anything of it was written; negative if the clock was set back since.
    """

    journal: Journal
    records: list[messages.Record]
    retired: list[Item]
    goodbyes: list[messages.Goodbye]
    attached: list[messages.Attach]
    cursors: dict[str, dict[tuple[str, Labels], tuple[Number, Number, Number]]]
    age_seconds: float

    def lives(self, host: str) -> bool | None:
        """Return whether a process of the service lives; ``None`` if that can't be checked on ``host``."""
        owners = [(self.journal.host, self.journal.owners), *(attach[1:] for attach in self.attached)]
        workers = [(record.update.host, (record.update.process,)) for record in self.records]
        every = {(its_host, process) for its_host, some in [*owners, *workers] for process in some}
        if any(lives(process) for its_host, process in every if its_host == host):
            return True
        hosts = {its_host for its_host, _ in [*owners, *workers]}
        return False if hosts == {host} and self.age_seconds <= namespace_seconds() else None

    def is_of_living_service(self, host: str) -> bool:
        """Return whether the service goes on, so that a new aggregator on ``host`` takes over its journal.

        If that can't be checked by pids, it counts as alive until the heartbeat timeout, unless the machine
        was restarted since.
        """
        if (living := self.lives(host)) is not None:
            return living
        is_fresh = self.age_seconds < messages.HEARTBEAT_TIMEOUT_SECONDS
        return is_fresh and is_same_boot(self.journal.host, host)


def read_journal(base: str) -> Saved | None:
    """Return the journal beside the socket ``base``; see `JournalFile.read`."""
    path = journal_of(base)
    _make_way_for_newer(path)
    saved = Saved(_NONE, [], [], [], [], {}, _age_of(base))
    for data in (data for path in (path, *tails_of(base)) for data in _frames(path)):
        message = decode(data)
        if isinstance(message, Journal):
            saved = saved._replace(journal=message)
        elif isinstance(message, messages.Record):
            saved.records.append(message)
        elif isinstance(message, messages.Retired):
            saved.retired.extend(message.items)
        elif isinstance(message, messages.Goodbye):
            saved.goodbyes.append(message)
        elif isinstance(message, messages.Attach):
            saved.attached.append(message)
        elif isinstance(message, messages.Cursor):
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
    for path in (journal_of(base), *tails_of(base), *_ours(glob.glob(glob.escape(base + SUFFIX) + "*"))):
        with contextlib.suppress(OSError):
            written.append(os.lstat(path).st_mtime)
    return time.time() - max(written, default=0.0)


def _make_way_for_newer(path: str) -> None:
    version = next((data[1] for data in _frames(path) if len(data) > 1), VERSION)
    if version > VERSION and abs(time.time() - os.stat(path).st_mtime) < _NEWER_SECONDS:
        raise AddressError(
            "the last aggregator at this address is of a newer release", got=version,
            expected="a journal of version " + " or ".join(map(str, READABLE)),
            remedy="a worker of that release starts the next one; without one, its counts are lost",
        )  # fmt: skip


def tails_of(base: str) -> list[str]:
    """Return the paths of the tails, the oldest first."""
    return sorted(_ours(glob.glob(glob.escape(base + TAIL) + "*")))


def journal_of(base: str) -> str:
    """Return the path of the existing journal, or of one to be written."""
    return max(named(base + JOURNAL), key=os.path.getmtime, default=usable(base + JOURNAL))


def named(path: str) -> list[str]:
    """Return the files of this user with the name ``path``, without or with a number."""
    return _ours([path, *glob.glob(glob.escape(path) + ".[0-9]*")])


def usable(path: str) -> str:
    """Return ``path``, with a number if another user has made a file of that name."""
    for number in range(1, _MAX_NAMES):
        name = f"{path}.{number}" if number > 1 else path
        if not os.path.lexists(name) or _ours([name]):
            return name
    return path


def _ours(paths: Iterable[str]) -> list[str]:
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_uid == os.geteuid():
                found.append(path)
    return found


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
        if not is_ours or (file.read(len(MAGIC)) != MAGIC and found.st_size):
            raise AddressError(
                f"the aggregator can't write {path}: the file is not a journal of this user",
                remedy="choose another address, or remove that file",
            )
        while (size := int.from_bytes(file.read(8), "big")) and size <= found.st_size - file.tell():
            yield file.read(size)
