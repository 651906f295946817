"""The aggregator: one loop that enters updates, answers requests, and runs for as long as it is needed.

Its life is `Aggregator.run`, step by step:

    STARTING    It takes the address, reads the journal of the aggregator before it, and binds its sockets.
    RECOVERING  The successor of another aggregator waits for the states of live workers.
    SERVING     It enters, answers and reports. If it fails now, another one takes its place.
    ENDED       See `.residence.Ends`.

Publications are entered before requests are answered, so an answer has everything that arrived before its
request. `.handler` handles the messages, `.reporters` the reporters, which run in threads of their own.

When the last worker exits, the reporters report before its goodbye is acknowledged. In a container, or under
a service manager, everything is killed as soon as the first process of the service has exited, which waits
for the acknowledgement, directly or through its workers. The loop goes on meanwhile; it only holds the reply
back.
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
from tapes.distributed.aggregator.answers import Answers, Question
from tapes.distributed.aggregator.handler import Handler
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.aggregator.reporters import START_SECONDS, Demand, Reports
from tapes.distributed.aggregator.residence import Ends, Residence
from tapes.distributed.protocol.wire import frames
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.preflight import new_context
from tapes.errors import AddressError, AddressInUse
from tapes.reporting import Reporter
from tapes.reporting.configured import reporters_from

T = TypeVar("T")

_TURN_MILLISECONDS = 100
_HOLDING_MILLISECONDS = 10  # milliseconds between two looks at replies that are held back
_BATCH = 200  # maximum number of messages that are received before the loop looks at anything else
_LINGER_MILLISECONDS = 500
"""Milliseconds that the reply to a `HandOver` may take to be sent."""
_RECOVERY_LOOKS = 10  # number of looks, a second in all, at whether live workers have sent their states again

_log = logging.getLogger("tapes.distributed")


class Aggregator:
    """An aggregator at ``endpoints`` with ``reporters``.

    Args:
        reason: Why it was started, for the log and the ``title``.
        configured: The configuration of the reporters, if that came from the environment; for the successor.
        supervised: Whether its parent process restarts it if it is killed.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        reporters: Sequence[Reporter],
        lifetime: Lifetime,
        *,
        reason: str = "",
        configured: Mapping[str, str] = MappingProxyType({}),
        supervised: bool = False,
    ) -> None:
        self._reporters = reporters
        self._lifetime = lifetime
        self.title = endpoints.publish + (reason and f", started for {reason}")
        self._handler = Handler(endpoints, lifetime, configured)
        self._residence = Residence(
            endpoints, self._handler, restartable=lifetime.is_joined, supervised=supervised
        )
        self._answers = Answers(self._handler.render, self._wake)
        self._reports = Reports(self._wake)
        self._deferred: list[tuple[list[bytes], bytes]] = []
        self._held: list[tuple[Demand, list[bytes]]] = []
        self._is_serving = False
        self._end: Ends | None = None
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until the lifetime is over; call ``ready`` once all is bound and reporters have started.

        Raises `AddressInUse` or `AddressError` if an address can't be bound; nothing is left behind.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._wake_receiver.close)
            stack.callback(self._wake_sender.close)
            # 1. Take the address, and what the aggregator before this one knew.
            self._when_free(self._residence.lock)
            stack.callback(lambda: self._residence.clear(self._how_it_ends()))
            configured = self._handler.restore()
            if configured and not self._reporters:
                self._reporters = reporters_from(configured)
            if not self._handler.is_successor:
                self._handler.journal.finish()  # a tail without a journal can't be restored
            # 2. Bind the sockets.
            context = new_context()
            stack.callback(lambda: context.destroy(linger=_LINGER_MILLISECONDS * self._handler.hands_over))
            self._when_free(lambda: self._residence.bind(context))
            ignores_terminal = self._lifetime.has_owner  # the owner gets its signals
            stack.enter_context(_signals(self.stop, ignores_terminal, self._wake_sender.fileno()))
            # 3. Recover, and start the reporters.
            self._recover()
            stack.callback(self._reports.stop)
            stack.callback(self._answers.stop)
            self._start_reporters()
            _log.info("tapes aggregator %d listens at %s", os.getpid(), self.title)
            self._is_serving = True
            ready()
            # 4. Serve.
            while True:
                self._serve(self._is_over)
                if self._may_leave():
                    break
            # 5. Send the last replies; everything above ends in reverse order.
            self._send_held(float("inf"))
            self._answers.stop()
            self._send_answers()

    def _how_it_ends(self) -> Ends:
        if self._end is not None:
            return self._end
        # An exception: another aggregator starts if this one had a service.
        is_successor = self._residence.predecessor_crashed or self._handler.is_successor
        return Ends.SUCCEEDED if self._is_serving or is_successor else Ends.UNNEEDED

    def _when_free(self, take: Callable[[], T]) -> T:
        """Return the result of ``take``; if the address is in use, wait for longer than an idle aggregator.

        Where processes join, they use an existing aggregator, so a second one ends at once.
        """
        gives_up = monotonic() + START_SECONDS
        while True:
            try:
                return take()
            except AddressInUse:
                if self._lifetime.is_joined or monotonic() >= gives_up:
                    raise
            time.sleep(_TURN_MILLISECONDS / 1000)

    def stop(self) -> None:
        """Ask the loop to end; from any thread or a signal handler."""
        self._lifetime.request_stop()
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the buffer is full, so the loop will wake, or has ended
            self._wake_sender.send(b"x")

    def _may_leave(self) -> bool:
        """Return whether it may end: no process is joining, and none has since the lifetime was over."""
        if self._handler.hands_over:
            self._end = self._end or Ends.SUCCEEDED
            return True
        try:
            if not self._residence.keep_out():
                return False
        except AddressError:  # the directory is gone: no process can join
            self._end = Ends.UNNEEDED
            return True
        while self._residence.requests.poll(0):
            self._answer()
        while not self._enter_updates():
            pass
        if self._held or not self._is_over(monotonic()):
            self._residence.let_in()
            return False
        self._end = Ends.UNNEEDED
        return True

    def _serve(self, is_done: Callable[[float], bool]) -> None:
        poller = zmq.Poller()
        for pollable in (self._residence.updates, self._residence.requests, self._wake_receiver):
            poller.register(pollable, zmq.POLLIN)
        looked = 0.0
        while not self._handler.hands_over:
            # 1. Wait for a message, or write the journal on.
            busy = self._handler.journal.step(monotonic())
            patience = _HOLDING_MILLISECONDS if self._held else _TURN_MILLISECONDS
            events = dict(poller.poll(0 if busy else patience))
            if self._wake_receiver.fileno() in events:
                self._wake_receiver.recv(4096)
            # 2. Enter updates; if that was all of them, answer requests.
            drained = self._enter_updates()
            if self._residence.requests in events and drained:
                self._answer()
            now = monotonic()
            self._send_held(now)
            self._send_answers()
            # 3. Now and then, look after everything else.
            if now - looked >= _TURN_MILLISECONDS / 1000:
                looked = now
                if self._residence.look_after():
                    self._handler.hands_over, self._end = True, Ends.HANDED_OVER
                if is_done(now):
                    return

    def _is_over(self, now: float) -> bool:
        is_over = self._lifetime.expired(now, self._handler.reap_workers(now))
        self._demand_reports(now)
        if self._lifetime.is_idle:
            self._reports.pause()
        else:
            self._reports.resume()
        return is_over

    def _start_reporters(self) -> None:
        def is_done(now: float) -> bool:
            return self._reports.have_started(now) or self._is_over(now)

        if not self._reports.begin(self._reporters, self._handler.registry, monotonic()):
            self._serve(is_done)

    def _demand_reports(self, now: float) -> Demand | None:
        is_due, self._handler.reports_due = self._handler.reports_due, False
        return self._reports.demand(now) if is_due else None

    def _recover(self) -> None:
        """Wait for the states of live workers; reads that arrive meanwhile wait, too."""
        looks = itertools.count(1)  # and not the time, as it may be stopped meanwhile

        def is_done(now: float) -> bool:
            self._handler.reap_workers(now)
            self._demand_reports(now)  # the first ones come when this is done
            return not self._handler.awaited or next(looks) >= _RECOVERY_LOOKS

        if self._handler.awaited:
            self._serve(is_done)
            self._handler.awaited.clear()
        for route, request in self._deferred:
            self._respond(route, request)
        self._deferred.clear()

    def _enter_updates(self) -> bool:
        """Enter publications; return whether that was all of them for now."""
        for _ in range(_BATCH):
            try:
                self._handler.publication(self._residence.updates.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
        return False

    def _answer(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_BATCH):
                *route, request = self._residence.requests.recv_multipart(zmq.NOBLOCK)
                self._respond(route, request)

    def _respond(self, route: list[bytes], request: bytes) -> None:
        answer = self._handler.answer(request)
        if answer is None:
            self._deferred.append((route, request))
        elif isinstance(answer, Question):
            self._answers.put(route, answer)
        elif (demand := self._demand_reports(monotonic())) is None:
            self._send([*route, answer])
        else:
            self._held.append((demand, [*route, answer]))

    def _send_answers(self) -> None:
        for route, answer in self._answers.ready():
            self._send([*route, *frames(answer)])

    def _send_held(self, now: float) -> None:
        """Send the replies whose reports were made, or have taken too long by ``now``."""
        for held in self._held.copy():
            if self._reports.is_met(held[0], now):
                self._held.remove(held)
                self._send(held[1])

    def _send(self, reply: Sequence[bytes | memoryview]) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the client has gone
            self._residence.requests.send_multipart(reply, zmq.NOBLOCK)


@contextlib.contextmanager
def _signals(stop: Callable[[], None], ignores_terminal: bool, wakeup_fd: int) -> Iterator[None]:
    """Call ``stop`` on SIGTERM, and on the terminal's signals or ignore those; in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        stop()

    of_terminal = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers: dict[int, Any] = dict.fromkeys(of_terminal, signal.SIG_IGN if ignores_terminal else end)
    handlers |= {signal.SIGTERM: end, signal.SIGCHLD: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    wakeup = signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
