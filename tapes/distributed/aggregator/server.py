"""The aggregator: one loop that takes in updates, answers questions, and lives as long as it is needed.

Publications are taken in before questions are answered, so that an answer has whatever arrived before the
question. Reporters run in threads of their own. What is done with the messages is in
`.handler`, what is done with the reporters in `.reporters`.

When the last worker leaves, reporters report before its goodbye is acknowledged: in a container, or under a
service manager, everything is killed as soon as the service's first process has ended, which waits for the
acknowledgement, directly or by its workers. The loop goes on meanwhile; it only holds the answer back.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import zmq

from tapes.clock import monotonic
from tapes.distributed.aggregator.answers import Answers, Wanted
from tapes.distributed.aggregator.handler import Handler
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.aggregator.relocation import hand_over
from tapes.distributed.aggregator.reporters import START_SECONDS, Demand, Reports
from tapes.distributed.protocol.wire import frames
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import Lock, is_served
from tapes.distributed.storage.start_lock import start_lock
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.preflight import new_context
from tapes.distributed.transport.sockets import bind, bind_again
from tapes.errors import AddressError, AddressInUse, TapesError
from tapes.reporting import Reporter
from tapes.reporting.configured import reporters_from

__all__ = ["Aggregator"]

T = TypeVar("T")

_TURN_MILLISECONDS = 100
_HOLDING_MILLISECONDS = 10
"""Maximum time between two looks at answers that are held back."""
_AT_ONCE = 200
"""So many publications are taken in before the loop looks at anything else."""
_LINGER_MILLISECONDS = 500
"""So long its last answer may be under way."""
_RECOVERY_LOOKS = 10
"""So often, a second in all, it looks whether workers have told again what they stand at."""

_log = logging.getLogger("tapes.distributed")


class Aggregator:
    """Listens at ``endpoints``, lets ``reporters`` report the sum, and lives as long as ``lease`` says.

    Args:
        endpoints, reporters, lease: See above.
        reason: Why it was started, for the log.
        configured: How the reporters are configured, if by the environment; for who takes its place.
        kept: Whether the process that made this one starts another one if it is killed.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        reporters: Sequence[Reporter],
        lease: Lifetime,
        *,
        reason: str = "",
        configured: Mapping[str, str] = MappingProxyType({}),
        kept: bool = False,
    ) -> None:
        self._endpoints = endpoints
        self._reporters = reporters
        self._lease = lease
        self._reason = reason
        self._books = Handler(endpoints, lease, configured)
        self._deferred: list[tuple[list[bytes], bytes]] = []
        self._answers = Answers(self._books.make, self._wake)
        self._reports = Reports(self._wake)
        self._held: list[tuple[Demand, list[bytes]]] = []
        self._is_missed = self._is_displaced = False
        self._lock = Lock(endpoints, restartable=lease.is_joined, supervised=kept)
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
            runtime_directory.restore(self._endpoints, runtime_directory.User.ourselves())
            self._when_free(self._lock.acquire)
            self._is_missed = self._lock.predecessor_crashed
            stack.callback(self._clear_away)
            before = self._books.restore()
            self._is_missed |= self._books.is_successor
            if before and not self._reporters:
                self._reporters = reporters_from(before)
            if not self._books.is_successor:
                self._books.journal.finish()  # a tail alone says nothing
            context = new_context()
            stack.callback(lambda: context.destroy(linger=_LINGER_MILLISECONDS * self._books.hands_over))
            updates, questions = self._when_free(lambda: bind(context, self._endpoints))
            stack.enter_context(self._signals())
            self._recover(updates, questions)
            stack.callback(self._reports.stop)
            stack.callback(self._answers.stop)
            self._start_reporters(updates, questions)
            _log.info(
                "tapes aggregator %d listens at %s%s",
                os.getpid(), self._endpoints.publish, self._reason and f", started for {self._reason}",
            )  # fmt: skip
            self._is_missed = True
            ready()
            while True:
                self._serve(updates, questions, self._is_over)
                if self._leave(updates, questions):
                    self._answer_held(questions, float("inf"))
                    self._answers.stop()
                    self._send_made(questions)
                    return

    def _when_free(self, take: Callable[[], T]) -> T:
        """Return what ``take`` returns, or raises for longer than an aggregator outlives its service.

        Where processes join, they have used the aggregator that is there, so a second one is one too many.
        """
        gives_up = monotonic() + START_SECONDS
        while True:
            try:
                return take()
            except AddressInUse:
                if self._lease.is_joined or monotonic() >= gives_up:
                    raise
            time.sleep(_TURN_MILLISECONDS / 1000)

    def stop(self) -> None:
        """Ask the loop to end, from any thread or a signal handler."""
        self._lease.request_stop()
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it has so much to read already, or has ended
            self._wake_sender.send(b"x")

    def _leave(self, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> bool:
        """Return whether it may leave: nobody is joining, and nobody has since the lease was over."""
        if self._books.hands_over:
            return True
        ourselves = runtime_directory.User.ourselves()
        with contextlib.ExitStack() as stack:
            try:
                if not stack.enter_context(start_lock(self._endpoints, ourselves, wait=False)):
                    return False
            except AddressError:  # the directory is gone: nobody can join
                self._is_missed = False
                return True
            while questions.poll(0):
                self._answer(questions)
            while not self._take_in(updates):
                pass
            if self._held or not self._is_over(monotonic()):
                return False
            # Until the directory is cleared away nobody can join: the lock goes last.
            self._clearing = stack.pop_all()
            self._is_missed = False
            return True

    def _clear_away(self) -> None:
        """Remove everything that it has made; but for what another one needs that takes its place."""
        if self._is_displaced:  # what is there is another one's
            self._books.journal.close()
            self._lock.close()
            return
        for path in self._endpoints.files:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._is_missed:  # it makes room, or failed
            self._books.journal.close()
            self._lock.release(keep_file=True)
            return
        self._books.journal.remove()
        self._lock.release()
        with self._clearing:
            runtime_directory.clear(self._endpoints)

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

    def _serve(
        self,
        updates: zmq.Socket[bytes],
        questions: zmq.Socket[bytes],
        is_done: Callable[[float], bool],
    ) -> None:
        poller = zmq.Poller()
        for pollable in (updates, questions, self._wake_receiver):
            poller.register(pollable, zmq.POLLIN)
        looked = 0.0
        while not self._books.hands_over:
            busy = self._books.journal.step(monotonic())
            patience = _HOLDING_MILLISECONDS if self._held else _TURN_MILLISECONDS
            events = dict(poller.poll(0 if busy else patience))
            if self._wake_receiver.fileno() in events:
                self._wake_receiver.recv(4096)
            drained = self._take_in(updates)
            if questions in events and drained:
                self._answer(questions)
            now = monotonic()
            self._answer_held(questions, now)
            self._send_made(questions)
            if now - looked >= _TURN_MILLISECONDS / 1000:
                looked = now
                self._look_after_files(updates, questions)
                if is_done(now):
                    return

    def _look_after_files(self, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> None:
        """Make files again that were removed: all of them if the lock was, else those that are missing."""
        if self._lock.is_lost:
            self._settle_again(updates, questions)
            return
        self._books.journal.look_after_files()
        if not all(map(os.path.lexists, self._endpoints.files)):
            with contextlib.suppress(AddressError):  # the next look tries again
                bind_again(updates, questions, self._endpoints, self._endpoints)
                _log.warning(
                    "tapes made its sockets at %s again, as one was removed", self._endpoints.publish
                )

    def _settle_again(self, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> None:
        """Make the files again that somebody has removed, there or elsewhere; or hand over to another one."""
        places = [self._endpoints, *runtime_directory.other_places(self._endpoints)]
        heir = next(
            filter(runtime_directory.has_aggregator, places), None
        )  # ours is lost, so that is another one
        if heir is None:
            any(self._settle_at(place, updates, questions) for place in places)
        elif hand_over(self._books.inheritance(), heir):
            _log.warning(
                "tapes found the files beside %s removed, and handed over to %s",
                self._endpoints.publish, heir.publish,
            )  # fmt: skip
            self._is_displaced = self._books.hands_over = True

    def _settle_at(self, place: Endpoints, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> bool:
        """Settle at ``place``; return whether that is done, or another one is just being started there."""
        ourselves = runtime_directory.User.ourselves()
        try:
            runtime_directory.restore(place, ourselves)
            with start_lock(place, ourselves, wait=False) as held:
                if not held or is_served(place):
                    return True
                lock = self._lock.moved_to(place)
                lock.acquire()
                try:
                    bind_again(updates, questions, self._endpoints, place)
                except AddressError:
                    lock.release()
                    raise
                self._lock.close()
                self._lock = lock
        except (OSError, TapesError):
            return False
        _log.warning(
            "tapes found the files beside %s removed, and made them again at %s",
            self._endpoints.publish, place.publish,
        )  # fmt: skip
        self._endpoints = place
        self._books.settle(place)
        return True

    def _is_over(self, now: float) -> bool:
        is_over = self._lease.expired(now, self._books.reap_workers(now))
        self._demand_reports(now)
        if self._lease.is_idle:
            self._reports.pause()
        else:
            self._reports.resume()
        return is_over

    def _start_reporters(self, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> None:
        """Start all reporters; serve while one of them waits for what something else has."""

        def is_done(now: float) -> bool:
            return self._reports.have_started(now) or self._is_over(now)

        if not self._reports.begin(self._reporters, self._books.registry, monotonic()):
            self._serve(updates, questions, is_done)

    def _demand_reports(self, now: float) -> Demand | None:
        """Have reporters report now if they have to; return what tells when they have."""
        is_due, self._books.reports_due = self._books.reports_due, False
        return self._reports.demand(now) if is_due else None

    def _recover(self, updates: zmq.Socket[bytes], questions: zmq.Socket[bytes]) -> None:
        """Wait for living workers to tell again what they stand at; whoever reads meanwhile waits too."""
        looks = itertools.count(1)  # and not the time: it may be stopped meanwhile

        def is_done(now: float) -> bool:
            self._books.reap_workers(now)
            self._demand_reports(now)  # the first ones come when this is done
            return not self._books.awaited or next(looks) >= _RECOVERY_LOOKS

        if self._books.awaited:
            self._serve(updates, questions, is_done)
            self._books.awaited.clear()
        for route, question in self._deferred:
            self._respond(questions, route, question)
        self._deferred.clear()

    def _take_in(self, updates: zmq.Socket[bytes]) -> bool:
        """Take in publications; return whether that was all of them for now."""
        for _ in range(_AT_ONCE):
            try:
                self._books.publication(updates.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
        return False

    def _answer(self, questions: zmq.Socket[bytes]) -> None:
        """Take in questions, and answer those that need no more than a word."""
        with contextlib.suppress(zmq.Again):
            for _ in range(_AT_ONCE):
                *route, question = questions.recv_multipart(zmq.NOBLOCK)
                self._respond(questions, route, question)

    def _respond(self, questions: zmq.Socket[bytes], route: list[bytes], question: bytes) -> None:
        answer = self._books.answer(question)
        if answer is None:
            self._deferred.append((route, question))
            return
        if isinstance(answer, Wanted):
            self._answers.put(route, answer)
            return
        demand = self._demand_reports(monotonic())
        if demand is None:
            _send(questions, [*route, answer])
        else:
            self._held.append((demand, [*route, answer]))

    def _send_made(self, questions: zmq.Socket[bytes]) -> None:
        for route, answer in self._answers.made():
            _send(questions, [*route, *frames(answer)])

    def _answer_held(self, questions: zmq.Socket[bytes], now: float) -> None:
        """Send the answers that waited for reports which were made, or have taken too long by ``now``."""
        for held in self._held.copy():
            if self._reports.is_met(held[0], now):
                self._held.remove(held)
                _send(questions, held[1])


def _send(questions: zmq.Socket[bytes], answer: Sequence[bytes | memoryview]) -> None:
    with contextlib.suppress(zmq.ZMQError):  # who asked has gone
        questions.send_multipart(answer, zmq.NOBLOCK)
