"""The aggregator: one loop that takes in updates, answers reads, and watches who lives.

Publications are taken in before reads are answered, so that an answer has whatever arrived before the
question. A message that is not one of ours is dropped, counted and logged; nothing a client sends ends the
loop. Reporters run in threads of their own and read the ledger through an ordinary registry, which also holds
the aggregator's own metrics: ``tapes.workers`` {state}, ``tapes.messages``, ``tapes.rejected``,
``tapes.publish.lag`` (from the making of a publication to its arrival) and ``tapes.aggregator.memory``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import zmq

from tapes import forks
from tapes.clock import monotonic, tick_at
from tapes.connection import Connection
from tapes.distributed import directory
from tapes.distributed.address import Endpoints, Lock
from tapes.distributed.lease import Lease
from tapes.distributed.ledger import Ledger
from tapes.distributed.messages import Goodbye, Hello, Item, Read, Reply, Update
from tapes.distributed.processes import ProcessWatch
from tapes.distributed.sockets import bind
from tapes.distributed.wills import Wills
from tapes.distributed.wire import decode, encode
from tapes.errors import AddressError, WireError
from tapes.exposition import FORMS, write
from tapes.metrics import Counter, Gauge, Timer
from tapes.registry import Registry
from tapes.reporting import Reporter
from tapes.reporting.base import FAILED, SKIPPED
from tapes.reporting.statsd import SENDS_FAILED
from tapes.snapshot import Snapshot

__all__ = ["Aggregator"]

_TURN_MILLISECONDS = 100
_AT_ONCE = 200
"""So many publications are taken in before the loop looks at anything else."""
_LAST_WORDS_SECONDS = 2.0
"""So long after its death a worker's messages may still arrive."""
_LAST_RECORD_SECONDS = 600.0
"""So long a child may take that was forked from a dead process to tell what that had recorded."""
_MOST_DEAD = 1000
_OURSELVES = bytes(16)
_WORKERS, _MEMORY = "tapes.workers", "tapes.aggregator.memory"

_log = logging.getLogger("tapes.distributed")


class _MergedView(Connection):
    """The connection of the registry that reporters read: it answers from the ledger."""

    is_aggregator = True

    def __init__(self, ledger: Ledger, registry: Registry) -> None:
        self._ledger = ledger
        self._registry = registry
        self._seq = 0
        self._lock = threading.Lock()
        self._live, self._retired = (registry.own(Gauge, _WORKERS, state=s) for s in ("live", "retired"))
        self._memory = registry.own(Gauge, _MEMORY)
        registry.describe(
            _WORKERS, "Worker processes that live, and that have left, since the aggregator began."
        )
        registry.describe(_MEMORY, "Resident memory of the aggregator.", unit="bytes")
        registry.describe("tapes.messages", "Messages that the aggregator received.")
        registry.describe("tapes.rejected", "Values and messages that were dropped.")
        registry.describe("tapes.publish.lag", "From the making of a publication to its arrival.")
        registry.describe("tapes.publish.duration", "What a worker spends on a publication.")
        registry.describe(FAILED, "Reports that failed.")
        registry.describe(SKIPPED, "Reports left out as the one before was not done.")
        registry.describe(SENDS_FAILED, "Packets for StatsD that could not be sent.")

    def snapshot(self) -> Snapshot:
        self.include_ourselves()
        return self._ledger.snapshot(tick_at(monotonic()))

    def render(self, form: str) -> bytes:
        if form == "states":
            self.include_ourselves()
            return encode(self._ledger.merged(tick_at(monotonic())))
        return write(self.snapshot(), form)

    def include_ourselves(self) -> None:
        """Enter the aggregator's own metrics into the ledger."""
        with self._lock:
            self._live.set(self._ledger.living - (self._seq > 0))  # it is in the ledger itself
            self._retired.set(self._ledger.retired)
            self._memory.set(_resident_bytes())
            self._seq += 1
            items = [Item(*series) for series in self._registry.collect()]
            described = self._registry.descriptions() if self._seq == 1 else {}
            self._ledger.apply(Update(_OURSELVES, forks.this_process(), "", self._seq, 0, items, described))


class Aggregator:
    """Listens at ``endpoints``, lets ``reporters`` report the sum, and lives as long as ``lease`` says."""

    def __init__(
        self, endpoints: Endpoints, reporters: Sequence[Reporter], lease: Lease, *, reason: str = ""
    ) -> None:
        self._endpoints = endpoints
        self._reporters = reporters
        self._lease = lease
        self._reason = reason
        self._ledger = Ledger()
        self._wills = Wills(endpoints)
        self._registry = Registry()
        self._view = _MergedView(self._ledger, self._registry)
        self._registry.connection = self._view
        self._watches: dict[bytes, ProcessWatch] = {}
        self._dead: dict[bytes, float] = {}
        self._messages = self._registry.own(Counter, "tapes.messages")
        self._lag = self._registry.own(Timer, "tapes.publish.lag")
        self._host = forks.host()
        self._clearing = contextlib.ExitStack()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until the lease is over.

        Args:
            ready: Called once everything is bound and reporters have started.

        Raises:
            AddressInUse, AddressError: If an address can't be bound; nothing is left behind.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._wake_receiver.close)
            stack.callback(self._wake_sender.close)
            directory.restore(self._endpoints, directory.User.ourselves())
            lock = Lock(self._endpoints)
            lock.acquire()
            stack.callback(self._clear_away, lock)
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, linger=0)
            updates, questions = bind(context, self._endpoints)
            stack.enter_context(self._signals())
            started: list[Reporter] = []
            stack.callback(_stop, started)
            for reporter in self._reporters:
                reporter.registry = self._registry
                reporter.start()
                started.append(reporter)
            _log.info(
                "tapes aggregator %d listens at %s%s",
                os.getpid(), self._endpoints.publish, self._reason and f", started for {self._reason}",
            )  # fmt: skip
            ready()
            while True:
                self._serve(updates, questions)
                if self._leave(updates, questions):
                    return

    def stop(self) -> None:
        """Ask the loop to end, from any thread or a signal handler."""
        self._lease.tell()
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"x")

    def _leave(self, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> bool:
        """Return whether it may leave: nobody is joining, and nobody has since the lease was over."""
        ourselves = directory.User.ourselves()
        with contextlib.ExitStack() as stack:
            try:
                if not stack.enter_context(directory.start_lock(self._endpoints, ourselves, wait=False)):
                    return False
            except AddressError:  # the directory is gone: nobody can join
                return True
            self._read_wills()
            while questions.poll(0):
                self._answer(questions)
            while not self._take_in(updates):
                pass
            now = monotonic()
            if not self._lease.expired(now, self._living(now)):
                return False
            # Until the directory is cleared away nobody can join: the lock goes last.
            self._clearing = stack.pop_all()
            return True

    def _clear_away(self, lock: Lock) -> None:
        """Remove everything that it has made."""
        for path in self._endpoints.files:
            with contextlib.suppress(OSError):
                os.unlink(path)
        lock.release()
        with self._clearing:
            directory.clear(self._endpoints)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """End on SIGTERM; on the terminal's signals too, unless there is an owner who gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        terminal = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        handlers: dict[int, Any] = dict.fromkeys(
            terminal, signal.SIG_IGN if self._lease.has_owner else self._on_signal
        )
        handlers[signal.SIGTERM] = self._on_signal
        handlers[signal.SIGCHLD] = signal.SIG_DFL
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        wakeup = signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop()

    def _serve(self, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for pollable in (updates, questions, self._wake_receiver):
            poller.register(pollable, zmq.POLLIN)
        looked = 0.0
        while True:
            events = dict(poller.poll(_TURN_MILLISECONDS))
            if self._wake_receiver.fileno() in events:
                self._wake_receiver.recv(4096)
            drained = self._take_in(updates)
            if questions in events and drained:
                self._answer(questions)
            now = monotonic()
            if now - looked >= _TURN_MILLISECONDS / 1000:
                looked = now
                self._read_wills()
                if self._lease.expired(now, self._living(now)):
                    return

    def _take_in(self, updates: zmq.Socket[bytes]) -> bool:
        """Take in publications; return whether that was all of them for now."""
        for _ in range(_AT_ONCE):
            try:
                data = updates.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._messages.increment()
            try:
                update = decode(data)
                if not isinstance(update, Update):
                    raise WireError("a publication", got=type(update).__name__, expected="Update")
            except WireError as error:
                self._reject(data, str(error))
            else:
                self._apply(update)
                self._lag.update(max(0.0, (forks.stamp() - update.seq) / 1e9))
        return False

    def _answer(self, questions: zmq.Socket[bytes]) -> None:
        try:
            *route, data = questions.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        self._messages.increment()
        try:
            question = decode(data)
            if not isinstance(question, (Read, Hello, Goodbye)):
                raise WireError("a question", got=type(question).__name__, expected="Read, Hello or Goodbye")
        except WireError as error:
            self._reject(data, str(error))
            reply = Reply(0, "error", f"it refused the question: {error}".encode())
        else:
            reply = self._reply(question)
        with contextlib.suppress(zmq.ZMQError):
            questions.send_multipart([*route, encode(reply)], zmq.NOBLOCK)

    def _reply(self, question: Read | Hello | Goodbye) -> Reply:
        number = question.correlation
        if isinstance(question, Hello):
            for process in question.processes if question.host == self._host else ():
                self._lease.stay_for(process)
            return Reply(number, "ok", b"")
        if not self._apply(question.update, published=isinstance(question, Goodbye)):
            return Reply(number, "behind", b"")
        if isinstance(question, Goodbye):
            self._retire(question.update.identity)
            return Reply(number, "ok", b"")
        if question.what != "states" and question.what not in FORMS:
            return Reply(number, "error", b"it does not know this format")
        try:
            return Reply(number, "ok", self._view.render(question.what))
        except Exception as error:
            _log.exception("tapes: the aggregator could not answer a read")
            return Reply(number, "error", repr(error).encode())

    def _apply(self, update: Update, *, published: bool = True) -> bool:
        complete, refused = self._ledger.apply(update, published=published)
        for name in refused:
            self._registry.reject(name, (), name, "another worker has it as another kind of metric")
        return complete

    def _reject(self, data: bytes, why: str) -> None:
        self._registry.reject("the aggregator", (), data[:40], why)

    def _read_wills(self) -> None:
        for will, data in self._wills.take_in():
            if isinstance(will, Goodbye):
                self._apply(will.update)
                self._retire(will.update.identity)
            else:
                self._reject(data, str(will))

    def _living(self, now: float) -> int:
        """Retire workers that have ended; return how many live."""
        workers = {w.identity: w for w in self._ledger.workers if w.identity != _OURSELVES}
        ended = set()
        for identity, worker in workers.items():
            if identity not in self._watches and worker.host == self._host:
                self._watches[identity] = ProcessWatch(worker.process)
            watch = self._watches.get(identity)
            if watch is not None and watch.ended():
                ended.add(identity)
        spoken_of = self._ledger.ancestors() if ended else set()
        for identity in ended & spoken_of:
            self._dead.pop(identity, None)
        for identity in ended - spoken_of:
            self._ledger.bury(identity)
            patience = _LAST_RECORD_SECONDS if workers[identity].silent else _LAST_WORDS_SECONDS
            if now - self._dead.setdefault(identity, now) >= patience or len(self._dead) > _MOST_DEAD:
                self._retire(identity)
        return len(workers.keys() - ended)

    def _retire(self, identity: bytes) -> None:
        self._ledger.retire(identity)
        self._dead.pop(identity, None)
        watch = self._watches.pop(identity, None)
        if watch is not None:
            watch.close()


def _stop(reporters: list[Reporter]) -> None:
    """Have all of them report a last time, beside each other, and wait for them."""
    for end in (*(r._no_more_reports for r in reporters), *(r.stop for r in reporters)):
        try:
            end()
        except Exception:
            _log.exception("tapes: a reporter failed to stop")


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
