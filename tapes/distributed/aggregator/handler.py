"""What the aggregator does with messages: it enters them, answers, retires who has ended, keeps the journal.

It knows no sockets. A message that is not one of ours is dropped, counted and logged; nothing a client sends
raises here.

One that takes the place of another begins with its journal, and answers no reader before the workers that
live have told it again what they stand at: what was answered once does not decrease.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping

from tapes import forks, processes
from tapes.clock import monotonic
from tapes.distributed.aggregator.answers import Wanted
from tapes.distributed.aggregator.entries import Worker, as_told
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.aggregator.lifetime import ForeignOwners, Lifetime
from tapes.distributed.aggregator.merged_view import JOURNAL_FAILED, LAG, MESSAGES, MergedView
from tapes.distributed.protocol.messages import (
    NOBODY,
    NOTHING,
    SILENT_SECONDS,
    Attach,
    Flush,
    Goodbye,
    HandOver,
    Journal,
    Message,
    Read,
    Record,
    Reply,
    Update,
)
from tapes.distributed.protocol.wire import VERSION, decode, encode, version_to_answer
from tapes.distributed.storage.journal import JournalFile
from tapes.distributed.storage.spool import Spool
from tapes.distributed.transport.address import Endpoints
from tapes.errors import WireError
from tapes.exposition import FORMS
from tapes.metrics import Counter, Timer
from tapes.processes import ProcessWatch, is_same_boot
from tapes.registry import Registry

__all__ = ["Handler"]

_LAST_WORDS_SECONDS = 2.0
"""So long after its death a worker's messages may still arrive."""
_LAST_RECORD_SECONDS = 600.0
"""So long a child may take that was forked from a dead process to tell what that had recorded."""
_MAX_DEAD = 1000

_log = logging.getLogger("tapes.distributed")


class Handler:
    """Keeps the ledger of an aggregator that listens at ``endpoints`` for as long as ``lease`` says.

    Args:
        endpoints, lease: Of the aggregator.
        configured: How its reporters are configured, if by the environment; for who takes its place.

    Attributes:
        registry: What reporters read: the merged view.
        journal: Its journal.
        hands_over: Whether it has been asked to make room for a newer version.
        is_successor: Whether it began with what another one knew.
        reports_due: Whether reporters have to report now, as the last worker has left or been found dead, or
            as a `Flush` asks for it. The aggregator sets it back.
        awaited: The workers of before that have yet to tell again what they stand at.
    """

    def __init__(self, endpoints: Endpoints, lease: Lifetime, configured: Mapping[str, str]) -> None:
        self.registry = Registry()
        self.journal = JournalFile(endpoints, self._pages, self._note_journal_failed)
        self.hands_over = self.is_successor = self.reports_due = False
        self.awaited: set[bytes] = set()
        self._endpoints = endpoints
        self._lease = lease
        self._configured = tuple(configured.items())
        self._ledger = Ledger()
        self._view = MergedView(self._ledger, self.registry)
        self.registry.use(self._view)
        self._spool = Spool(endpoints)
        self._watches: dict[bytes, ProcessWatch] = {}
        self._spoke: set[bytes] = set()
        self._heard: dict[bytes, float] = {}
        self._dead: dict[bytes, float] = {}
        self._became_another: set[bytes] = set()
        self._as_heir = os.urandom(16)
        self._journal_fails = False
        self._is_unreported = False
        self._messages = self.registry.own(Counter, MESSAGES)
        self._lag = self.registry.own(Timer, LAG)
        self._host = processes.host_id()
        self._elsewhere = ForeignOwners(self._host)

    def restore(self) -> dict[str, str]:
        """Begin with what the aggregator before this one knew, if its service still lives.

        Returns:
            How that one's reporters were configured, if by the environment.

        Raises:
            AddressError: If there is somebody's file where the journal has to be.
        """
        try:
            saved = self.journal.read()
        except WireError as error:
            self._reject(b"", error)
            return {}
        if saved is None:
            return {}
        if not saved.is_of_living_service(self._host):
            self.journal.remove()
            self._spool.remove()
            return {}
        self.is_successor = True
        self._ledger.restore(saved.journal, saved.records)
        for goodbye in saved.goodbyes:
            self._apply(goodbye.update, published=False, leaves=True)  # it was said to the one before
            self._ledger.retire(goodbye.update.identity)
        for owner in saved.owners(self._host):
            self._lease.keep_alive_for(owner)
        self._elsewhere.add(saved.journal.host, saved.journal.owners)
        for hello in saved.hellos:
            self._elsewhere.add(hello.host, hello.processes)
        self._configured = self._configured or saved.journal.reporters
        self.awaited = {worker.identity for worker in self._ledger.workers if not worker.silent}
        self.journal.changed(urgent=True)
        _log.warning(
            "tapes aggregator %d takes the place of one that ended, with the totals of %d workers that left",
            os.getpid(), self._ledger.retired,
        )  # fmt: skip
        return dict(saved.journal.reporters)

    def settle(self, endpoints: Endpoints) -> None:
        """Go on beside ``endpoints``, as the files were removed."""
        self._endpoints = endpoints
        self._spool = Spool(endpoints)
        self.journal.settle(endpoints)

    def inheritance(self) -> Iterator[Attach | Read | Goodbye]:
        """Yield what another aggregator has to know that goes on instead of this one."""
        yield Attach(1, self._host, self._lease.owners)
        ancestors: list[Update] = []
        for worker in self._ledger.workers:
            updates = [record.update for record in self._ledger.records_of(worker.identity)]
            if worker.silent:
                ancestors += updates
            elif worker.identity != NOBODY:
                yield from (Read(2, NOTHING, update) for update in updates)
        records, _, _ = self._ledger.records_of_retired(self._view.for_the_journal())
        total = [as_told(item) for record in records for item in record.update.items]
        yield Goodbye(3, Update(
            self._as_heir, forks.this_process(), self._host, forks.now_ns(), 0, total,
            self._ledger.descriptions, tuple(ancestors), self._ledger.max_series,
        ))  # fmt: skip

    def publication(self, data: bytes) -> None:
        """Enter what a worker published."""
        self._messages.increment()
        try:
            update = decode(data)
            if not isinstance(update, Update):
                raise WireError("a publication", got=type(update).__name__, expected="Update")
            self._apply(update)
        except Exception as error:
            self._reject(data, error)
        else:
            self._lag.update(max(0.0, (forks.now_ns() - update.seq) / 1e9))

    def answer(self, data: bytes) -> bytes | Wanted | None:
        """Return the answer to a question.

        Returns:
            The answer; or what `make` has to make for it; or ``None`` if it has to be asked again when no
            worker is awaited.
        """
        self._messages.increment()
        version = version_to_answer(data)
        try:
            question = decode(data)
            if not isinstance(question, (Read, Attach, Goodbye, Flush, HandOver)):
                raise WireError(
                    "a question",
                    got=type(question).__name__,
                    expected="Read, Attach, Goodbye, Flush or HandOver",
                )
            if self.awaited and isinstance(question, Read) and question.what != NOTHING:
                return None
            reply = self._reply(question, data, version)
            return reply if isinstance(reply, Wanted) else encode(reply, version)
        except Exception as error:
            self._reject(data, error)
            refusal = Reply(0, "error", f"it refused the question: {error}".encode(errors="replace"))
            return encode(refusal, version)

    def make(self, what: str, version: int) -> tuple[str, bytes]:
        """Return the status and the payload of the answer to a read; safe from any thread."""
        try:
            return "ok", self._view.states(version) if what == "states" else self._view.render(what)
        except Exception as error:
            _log.exception("tapes: the aggregator could not answer a read")
            return "error", repr(error).encode(errors="replace")

    def reap_workers(self, now: float) -> int:
        """Read wills, and retire workers that have ended; return how many live."""
        workers = {w.identity: w for w in self._ledger.workers if w.identity != NOBODY}
        ended = {identity for identity, worker in workers.items() if self._has_ended(worker, now)}
        self._spoke.clear()
        # After that: whoever has ended has left its will before.
        for will, data in self._spool.drain():
            if isinstance(will, Goodbye):
                if is_same_boot(will.update.host, self._host):
                    self._leave(will, data)
                ended.discard(will.update.identity)
                workers.pop(will.update.identity, None)
            else:
                self._reject(data, will)
        self.awaited -= ended
        spoken_of = self._ledger.ancestors() if ended else set()
        if ended - spoken_of - self._dead.keys():
            self.journal.changed(urgent=True)
        for identity in ended & spoken_of:
            self._dead.pop(identity, None)
        for identity in ended - spoken_of:
            self._ledger.bury(identity)
            patience = _LAST_RECORD_SECONDS if workers[identity].silent else _LAST_WORDS_SECONDS
            if (
                identity not in self._watches and identity not in self._became_another
            ):  # it may only be silent
                patience = float("inf")
            if now - self._dead.setdefault(identity, now) >= patience or len(self._dead) > _MAX_DEAD:
                self._retire(workers[identity])
        self._report_if_alone(worker for identity, worker in workers.items() if identity not in ended)
        return len(workers.keys() - ended)

    def _report_if_alone(self, living: Iterable[Worker]) -> None:
        """Note that reports are due if workers have changed something since, and none lives that may again.

        The silent ones don't count: what they recorded is all known, and some live as long as the service.
        """
        if self._is_unreported and all(worker.silent for worker in living):
            self.reports_due, self._is_unreported = True, False

    def _has_ended(self, worker: Worker, now: float) -> bool:
        """Return whether a worker has ended; where its pid means nothing, whether it has been silent long."""
        identity = worker.identity
        if identity in self._became_another:
            return True
        if worker.host != self._host:
            if identity in self._spoke or identity not in self._heard:
                self._heard[identity] = now
                if self._dead.pop(identity, None) is not None:
                    self._ledger.bury(identity, is_dead=False)
            return now - self._heard[identity] > SILENT_SECONDS
        if identity not in self._watches:
            self._watches[identity] = ProcessWatch(worker.process, worker.program)
        return self._watches[identity].ended()

    def _reply(
        self, question: Read | Attach | Goodbye | Flush | HandOver, data: bytes, version: int
    ) -> Reply | Wanted:
        number = question.correlation
        if isinstance(question, HandOver):
            return self._hand_over(question)
        if isinstance(question, Attach):
            for process in question.processes if question.host == self._host else ():
                self._lease.keep_alive_for(process)
            self._elsewhere.add(question.host, question.processes)
            self.journal.changed()
            return Reply(number, "ok", b"")
        if isinstance(question, Goodbye):
            left, now = self._leave(question, data), monotonic()
            others = (w for w in self._ledger.workers if w.identity != NOBODY)
            self._report_if_alone(w for w in others if not self._has_ended(w, now))
            return Reply(number, "ok" if left else "behind", b"")
        if isinstance(question, Flush):
            self.reap_workers(monotonic())
            self.reports_due, self._is_unreported = True, False
            return Reply(number, "ok", b"")
        if not self._apply(question.update, published=False):
            return Reply(number, "behind", b"")
        if question.what == NOTHING:
            return Reply(number, "ok", b"")
        if question.what != "states" and question.what not in FORMS:
            return Reply(number, "error", b"it does not know this format")
        return Wanted(question.what, version, number)

    def _leave(self, goodbye: Goodbye, data: bytes) -> bool:
        """Retire who says goodbye, and write that down; return whether everything of it is known."""
        if not self._apply(goodbye.update, leaves=True):
            return False
        self._retire(goodbye.update)
        self.journal.note(data)
        return True

    def _hand_over(self, question: HandOver) -> Reply:
        """Make room for a newer version; what workers that live can't tell that one is in the journal."""
        if question.version <= VERSION or self._endpoints.path is None or not self._lease.is_joined:
            return Reply(question.correlation, "error", b"nobody could take its place")
        if not self.journal.finish():
            return Reply(question.correlation, "error", b"it can't write down what it knows")
        _log.warning("tapes aggregator %d makes room for one of a newer version", os.getpid())
        self.hands_over = True
        return Reply(question.correlation, "ok", b"")

    def _apply(self, update: Update, *, published: bool = True, leaves: bool = False) -> bool:
        is_new = not (leaves or self._ledger.knows(update.identity))
        complete, refused = self._ledger.apply(update, published=published)
        if is_new:  # whoever takes this aggregator's place has to wait for this worker too
            self._note_former_selves(update)
            head = update._replace(seq=1, base=0, items=[], descriptions={}, ancestors=())
            self.journal.note(encode(Record(head)))
        for name in refused:
            self.registry.reject(
                name,
                (),
                name,
                "workers differ in its kind or in how it merges; the newest one is right",
            )
        if complete:
            self.awaited.discard(update.identity)
        self._spoke.add(update.identity)
        self._is_unreported = True
        self.journal.changed()
        return complete

    def _note_former_selves(self, update: Update) -> None:
        """Note which workers ended as their process became another program, or itself again, by ``exec``."""
        for former in self._ledger.former_selves(update):
            self._became_another.add(former)
            self._ledger.bury(former)

    def _retire(self, worker: Worker | Update) -> None:
        identity = worker.identity
        self._elsewhere.discard(worker.host, worker.process)
        self._ledger.retire(identity)
        self._dead.pop(identity, None)
        self._heard.pop(identity, None)
        self._became_another.discard(identity)
        watch = self._watches.pop(identity, None)
        if watch is not None:
            watch.close()

    def _reject(self, data: bytes, error: Exception) -> None:
        self.journal.changed()
        self.registry.reject("the aggregator", (), data[:40], str(error))

    def _pages(self) -> Iterator[Message]:
        """Yield what is to be in the journal: the living first, as who leaves meanwhile is in the total."""
        for worker in self._ledger.workers:
            if worker.identity != NOBODY:
                yield from self._ledger.records_of(worker.identity)
        records, left, retired = self._ledger.records_of_retired(self._view.for_the_journal())
        yield from self._elsewhere.hellos()
        yield Journal(
            self._host, self._lease.owners, self._configured, retired, left,
            self._ledger.descriptions, self._ledger.max_series,
        )  # fmt: skip
        yield from records

    def _note_journal_failed(self, error: Exception) -> None:
        self.registry.own(Counter, JOURNAL_FAILED).increment()
        # Where its directory was removed it is made again, or everything is about to end.
        if not self._journal_fails and not isinstance(error, FileNotFoundError):
            self._journal_fails = True
            _log.warning(
                "tapes can't write its journal (%s): should the aggregator be killed now, what workers that "
                "left had counted is lost; it keeps trying, and logs this only once",
                error,
            )
