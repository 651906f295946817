"""The handler of an aggregator's messages: it enters updates, answers requests, and retires exited workers.

It knows no sockets. A message that is not one of ours is dropped, counted and logged; nothing that a client
sends raises here.

The successor of another aggregator begins with its journal, and answers no read before the live workers have
sent their states again, so that totals that were read once do not decrease.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

from tapes import forks, processes
from tapes.clock import monotonic
from tapes.distributed.aggregator.answers import Question
from tapes.distributed.aggregator.checkpoint import Checkpoint
from tapes.distributed.aggregator.entries import Source, Worker
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.aggregator.merged_view import JOURNAL_FAILED, LAG, MESSAGES, MergedView
from tapes.distributed.aggregator.reaping import Reaper
from tapes.distributed.protocol import messages
from tapes.distributed.protocol.messages import Reply, Update
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.distributed.storage.journal import JournalFile
from tapes.distributed.storage.spool import Spool
from tapes.distributed.transport.address import Endpoints
from tapes.errors import WireError
from tapes.exposition import FORMS
from tapes.metrics import Counter, Timer
from tapes.processes import is_same_boot
from tapes.registry import Registry

Request = messages.Read | messages.Attach | messages.Goodbye | messages.Flush | messages.HandOver

_log = logging.getLogger("tapes.distributed")


class Handler:
    """Keeps the ledger of an aggregator at ``endpoints``.

    Args:
        configured: The configuration of its reporters, if that came from the environment.

    Attributes:
        registry: The registry that reporters read: the merged view.
        hands_over: Whether it was asked to make room for a newer version.
        is_successor: Whether it began with the journal of another aggregator.
        reports_due: Whether reporters have to report now, as no worker is alive any more, or as a `Flush`
            asks for it. The aggregator resets it.
        awaited: The workers in that journal that have not sent their states again.
    """

    def __init__(self, endpoints: Endpoints, lifetime: Lifetime, configured: Mapping[str, str]) -> None:
        self.registry = Registry()
        self.hands_over = self.is_successor = self.reports_due = False
        self.awaited: set[bytes] = set()
        self._endpoints, self._lifetime = endpoints, lifetime
        self._host = processes.host_id()
        self._ledger = Ledger()
        self._reaper = Reaper(self._ledger)
        self._view = MergedView(self._ledger, self.registry, self._append)
        self.registry.use(self._view)
        self._checkpoint = Checkpoint(self._ledger, self._view, lifetime, configured)
        self.journal = JournalFile(
            endpoints, self._checkpoint.living, self._checkpoint.totals, self._note_journal_failed
        )
        self.inheritance = self._checkpoint.inheritance
        self._spool = Spool(endpoints)
        self._journal_fails = self._is_unreported = False
        self._messages = self.registry.own(Counter, MESSAGES)
        self._lag = self.registry.own(Timer, LAG)

    def restore(self) -> dict[str, str]:
        """Begin with the journal of the aggregator before this one, if its service is still alive.

        Returns the configuration of its reporters, if that came from the environment. Raises `AddressError`
        if there is another file in the place of the journal.
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
        self._checkpoint.restore(saved)
        for goodbye in saved.goodbyes:
            self._apply(goodbye.update, leaves=True)
            self._ledger.retire(goodbye.update.identity)
        self.awaited = {worker.identity for worker in self._ledger.workers if not worker.is_ancestor}
        self.journal.changed(urgent=True)
        _log.warning(
            "tapes aggregator %d takes the place of one that ended, with the totals of %d exited workers",
            os.getpid(), self._ledger.retired,
        )  # fmt: skip
        return dict(saved.journal.reporters)

    def settle(self, endpoints: Endpoints) -> None:
        """Continue beside ``endpoints``, as the files were removed."""
        self._endpoints = endpoints
        self._spool = Spool(endpoints)
        self.journal.settle(endpoints)

    def publication(self, data: bytes) -> None:
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

    def answer(self, data: bytes) -> bytes | Question | None:
        """Return the answer to a request; or the question that `render` has to answer.

        ``None`` means that the request has to be passed again when no worker is awaited.
        """
        self._messages.increment()
        try:
            request = decode(data)
            if not isinstance(request, Request):
                expected = "Read, Attach, Goodbye, Flush or HandOver"
                raise WireError("a request", got=type(request).__name__, expected=expected)
            if self.awaited and isinstance(request, messages.Read) and request.what != messages.NOTHING:
                return None
            reply = self._reply(request, data)
            return reply if isinstance(reply, Question) else encode(reply)
        except Exception as error:
            self._reject(data, error)
            return encode(Reply(0, "error", f"it refused the request: {error}".encode(errors="replace")))

    def render(self, what: str) -> tuple[str, bytes]:
        """Return the status and the payload of the answer to a read; safe from any thread."""
        try:
            return "ok", self._view.states() if what == "states" else self._view.render(what)
        except Exception as error:
            _log.exception("tapes: the aggregator could not answer a read")
            return "error", repr(error).encode(errors="replace")

    def reap_workers(self, now: float) -> int:
        """Drain the spool, and retire workers that have exited; return the number of live ones."""
        # 1. Who has exited: before the spool, as an exited worker has written its last update by then.
        workers = {worker.identity: worker for worker in self._ledger.workers}
        exited = self._reaper.exited(workers, now)
        # 2. Last updates from the spool.
        for goodbye, data in self._spool.drain():
            if isinstance(goodbye, messages.Goodbye):
                if is_same_boot(goodbye.update.host, self._host):
                    self._retire_with(goodbye, data)
                exited.discard(goodbye.update.identity)
                workers.pop(goodbye.update.identity, None)
            else:
                self._reject(data, goodbye)
        # 3. Exited workers are dead for a while, and then retired.
        self.awaited -= exited
        if self._reaper.is_newly_dead(exited):
            self.journal.changed(urgent=True)
        for worker in self._reaper.due(exited, workers, now):
            self._retire(worker)
        # 4. Reports are due if that was the last worker.
        self._report_if_alone(worker for identity, worker in workers.items() if identity not in exited)
        return len(workers.keys() - exited)

    def _report_if_alone(self, living: Iterable[Worker]) -> None:
        """Have reporters report if something has changed since the last time, and no worker is alive."""
        # Ancestors don't count: all that they recorded is known, and some live as long as the service.
        if self._is_unreported and all(worker.is_ancestor for worker in living):
            self.reports_due, self._is_unreported = True, False

    def _reply(self, request: Request, data: bytes) -> Reply | Question:
        number = request.correlation
        match request:
            case messages.HandOver():
                return self._hand_over(request)
            case messages.Attach():
                self._lifetime.attach(request.host, request.processes)
                self.journal.changed()
                return Reply(number, "ok", b"")
            case messages.Goodbye():
                is_known, now = self._retire_with(request, data), monotonic()
                self._report_if_alone(w for w in self._ledger.workers if not self._reaper.has_exited(w, now))
                return Reply(number, "ok" if is_known else "behind", b"")
            case messages.Flush():
                self.reap_workers(monotonic())
                self.reports_due, self._is_unreported = True, False
                return Reply(number, "ok", b"")
        if not self._apply(request.update, Source.READ):
            return Reply(number, "behind", b"")
        if request.what == messages.NOTHING:
            return Reply(number, "ok", b"")
        if request.what != "states" and request.what not in FORMS:
            return Reply(number, "error", b"it does not know this format")
        return Question(request.what, number)

    def _retire_with(self, goodbye: messages.Goodbye, data: bytes) -> bool:
        """Retire a worker with its last update, and journal that; return whether all of it is known."""
        if not self._apply(goodbye.update, leaves=True):
            return False
        self._retire(goodbye.update)
        self.journal.append(data)
        return True

    def _hand_over(self, request: messages.HandOver) -> Reply:
        """Make room for a newer version; the journal has everything that live workers don't send again."""
        if request.version <= VERSION or self._endpoints.path is None or not self._lifetime.is_joined:
            return Reply(request.correlation, "error", b"no other aggregator could take its place")
        if not self.journal.finish():
            return Reply(request.correlation, "error", b"it can't write its journal")
        _log.warning("tapes aggregator %d makes room for one of a newer version", os.getpid())
        self.hands_over = True
        return Reply(request.correlation, "ok", b"")

    def _apply(self, update: Update, source: Source = Source.DIRECT, *, leaves: bool = False) -> bool:
        senders = (update, *update.ancestors) if not leaves else ()
        before = {sender.identity: self._ledger.source_of(sender.identity) for sender in senders}
        complete, refused = self._ledger.apply(update, source)
        self._reaper.note(update, is_new=before.get(update.identity, source) is None)
        for record in self._checkpoint.news_of(update, before):
            self._append(record)
        for name in refused:
            why = "workers differ in its kind or in how it merges; the newest one is right"
            self.registry.reject(name, (), name, why)
        if complete:
            self.awaited.discard(update.identity)
        self._is_unreported = True
        self.journal.changed()
        return complete

    def _retire(self, worker: Worker | Update) -> None:
        self._lifetime.detach(worker.host, worker.process)
        self._ledger.retire(worker.identity)
        self._reaper.forget(worker.identity)

    def _append(self, message: messages.Message) -> bool:
        return self.journal.append(encode(message))

    def _reject(self, data: bytes, error: Exception) -> None:
        self.journal.changed()
        self.registry.reject("the aggregator", (), data[:40], str(error))

    def _note_journal_failed(self, error: Exception) -> None:
        self.registry.own(Counter, JOURNAL_FAILED).increment()
        # If its directory was removed, it is made again, or the service is about to end.
        if not self._journal_fails and not isinstance(error, FileNotFoundError):
            self._journal_fails = True
            _log.warning(
                "tapes can't write its journal (%s): if the aggregator is killed now, the counts of workers "
                "that have exited are lost; it keeps trying, and logs this only once", error,
            )  # fmt: skip
