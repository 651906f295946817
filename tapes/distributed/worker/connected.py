"""The session of a connected registry: it publishes, reads for the whole service, and leaves.

A read carries the changes of this process, as a separate publication could arrive after it. It presumes that
the aggregator has everything published before. If some of that is still under way, the aggregator replies
that it is behind, and gets a keyframe. So a reader always sees its own events.

Leaving is a request too: the last values, acknowledged. If no aggregator acknowledges them they are spooled
beside the socket. Every end of a process that `tapes.shutdown` notices leaves.

At a fork the parent stops its thread and closes its sockets, so that nothing is in the middle of anything.
The child gets a session of its own, which opens no descriptor before it is first used (`tapes.session`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from math import inf

from tapes import forks, shutdown, threads
from tapes.distributed.protocol.messages import NOTHING, Goodbye, Merged, Read, Reply, Update
from tapes.distributed.protocol.wire import decode
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import is_served
from tapes.distributed.supervision import rendezvous
from tapes.distributed.transport import requests
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.requests import TIMEOUT_SECONDS, SocketPool, incarnation, request
from tapes.distributed.transport.sockets import Socket
from tapes.distributed.worker.gate import Gate
from tapes.distributed.worker.late_flush import LateSession
from tapes.distributed.worker.outbox import Goodbyes, Outbox
from tapes.distributed.worker.publisher import Publisher
from tapes.environment import hand_down, may_start
from tapes.errors import AggregatorUnavailable, WireError
from tapes.metrics import State
from tapes.naming import Labels
from tapes.registry import Registry, default_registry
from tapes.session import LocalSession, Session
from tapes.sharing import Shared
from tapes.snapshot import Snapshot

_PAUSE_SECONDS = 0.25  # maximum time that a fork waits for requests and for the publisher, each

_log = logging.getLogger("tapes.distributed")


def attach(registry: Registry, endpoints: Endpoints) -> ConnectedSession:
    """Give ``registry`` a session that publishes to ``endpoints``; it opens when it is first used."""
    session = ConnectedSession(registry, endpoints)
    _attached.add(session)
    registry.use(session)
    _hand_down()
    return session


def _hand_down() -> None:
    """Hand the addresses down to processes that this one will spawn; the default registry's comes first."""
    alive = [session for session in _attached if session.is_of_this_process]
    default = [c.endpoints.publish for c in alive if c.registry is default_registry]
    others = [c.endpoints.publish for c in alive if c.registry is not default_registry]
    hand_down([*(default or [""]), *others] if alive else [])


def _leave_all() -> None:
    for session in list(_attached):
        if session.is_of_this_process:
            try:
                session.registry.session.leave()
            except Exception:
                _log.exception("tapes could not send the last values of this process")


_attached: set[ConnectedSession] = set()
_of_parents: list[ConnectedSession] = []  # kept in a child: freeing their sockets would touch the parent's

shutdown.register(_leave_all, shutdown.Phase.GOODBYE)


class ConnectedSession(Session):
    """Publishes ``registry`` to the aggregator at ``endpoints``, and requests the merged view of that.

    It has no thread and no descriptor before it is opened, by `open` or by a read. Its metrics sleep until
    the first value is recorded, which is published at once.
    """

    is_connected = True

    def __init__(self, registry: Registry, endpoints: Endpoints) -> None:
        super().__init__(registry, registry.session.connect)
        self.sleeps = True
        self.endpoints = endpoints
        self._aggregator = incarnation(endpoints)
        self._pid = os.getpid()
        self._gate = Gate()
        self._late: LateSession | None = None
        self._was_open = False
        self._correlations = itertools.count(1)
        self._sockets = SocketPool(endpoints)
        self._outbox = Outbox(registry)
        self._goodbyes = Goodbyes(registry)
        self._shared: Shared[Reply] = Shared(requests.MAX_WAIT_SECONDS)
        self._publisher: Publisher | None = None
        self._opening = threads.RLock()

    def open(self) -> None:
        if self._publisher is None:
            # It is not opened while it is being closed.
            with contextlib.suppress(AggregatorUnavailable), self._gate.request():
                self._open()

    def _open(self) -> Publisher:
        with self._opening:
            if self._publisher is None:
                self._outbox.begin(is_another_aggregator=self._meets_another_aggregator)
                publisher = Publisher(self._sockets, self.endpoints, self._outbox, self.move)
                publisher.start()
                self._publisher = publisher
            return self._publisher

    @property
    def _meets_another_aggregator(self) -> bool:
        return self._aggregator not in (None, incarnation(self.endpoints))

    def woken(self) -> bool:
        """Publish the first values at once, or open in a thread; return that the metric stays awake."""
        if self._late is not None:
            return self._late.woken()
        if self.sleeps:
            self.sleeps = False
            if self._publisher is None:
                self._start_opening()
            else:
                self._publisher.publish_soon()
        return True

    def has_aggregator(self) -> bool:
        """Return whether an aggregator lives at ``endpoints``; it is asked where no lock file shows that."""
        if not may_start() or is_served(self.endpoints):
            return True
        result = rendezvous.attach(self.endpoints, forks.this_process())
        return result is rendezvous.Attachment.ATTACHED

    @property
    def is_of_this_process(self) -> bool:
        """Whether this process made the session, and not one that it was forked from."""
        return self._pid == os.getpid()

    def published(self, series: tuple[str, Labels]) -> State | None:
        return self._outbox.published(series)

    def published_version(self) -> int:
        return self._outbox.published_seq

    def request_ended(self, *, may_be_the_last: bool = False) -> None:
        if may_be_the_last:
            try:
                self._request(NOTHING)
            except AggregatorUnavailable:
                self.leave()  # which spools
            return
        self.open()
        if self._publisher is not None:
            self._publisher.request_ended()

    def snapshot(self) -> Snapshot:
        """Return the merged view; raises AggregatorUnavailable if there is no answer within a second."""
        payload = self._request("states").payload
        try:
            merged = decode(payload, most=inf)
            if not isinstance(merged, Merged):
                raise WireError("merged states", got=type(merged).__name__, expected="Merged")
        except WireError as error:
            raise AggregatorUnavailable(f"the aggregator's reply can't be used ({error})") from error
        return merged.snapshot()

    def render(self, form: str, write: object = None) -> bytes:
        """Return the merged view, written by the aggregator; raises as `snapshot`."""
        return self._request(form).payload

    def close(self) -> None:
        """Stop publishing, flush, and make the registry a local one; takes 1 s at most without an answer.

        What was flushed is no longer here: the registry starts again from zero. If no aggregator
        acknowledges it, it is spooled, kept, and sent by the next session of the registry.
        """
        self.flush_and_stop()
        _attached.discard(self)
        if self.registry.session is self:
            self.registry.use(self._late or LocalSession(self.registry, self.connect))
        _hand_down()

    def leave(self) -> None:
        if self.is_of_this_process and self._late is None:
            registry, endpoints = self.registry, self.endpoints
            flush = lambda: ConnectedSession(registry, endpoints).flush_and_stop()  # noqa: E731
            self._late = LateSession(registry, self.connect, flush)
            self._late.begin(self)

    def flush_and_stop(self) -> None:
        if not self.is_of_this_process:
            return
        self.move(runtime_directory.current_place(self.endpoints))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        # 1. Let no request begin, and wait for those in flight.
        if not self._gate.close():
            return
        idle = self._gate.is_idle(TIMEOUT_SECONDS)
        # 2. Stop publishing.
        publisher = self._publisher
        if publisher is None:
            self._outbox.begin(is_another_aggregator=self._meets_another_aggregator)
        ended = publisher is None or publisher.stop(max(0.0, deadline - time.monotonic()))
        # 3. Take everything out of the registry.
        last = self._outbox.drain()
        if publisher is None or not publisher.is_subscribed:
            last = self._outbox.for_another(last)
        if publisher is not None or last.has_something:
            self._goodbyes.add(last)
        if not self._goodbyes:
            return
        # 4. Send it.
        try:
            with self._sockets.borrow() as socket:
                self._send_goodbyes(socket, deadline)
        except AggregatorUnavailable:
            self._goodbyes.replace(last, self._outbox.for_another(last))
        # 5. Close the sockets, as a file needs a descriptor, and spool what no aggregator acknowledged.
        self._sockets.close(is_unused=ended and (idle or self._gate.is_idle()))
        self._goodbyes.spool(self.endpoints)

    def before_fork(self) -> None:
        """End the thread and close the sockets, unless a thread is using them."""
        super().before_fork()
        with self._gate:
            if self._may_pause():
                self._pause(_PAUSE_SECONDS)

    def _may_pause(self) -> bool:
        is_me = self._publisher is not None and self._publisher.is_me()
        return self.is_of_this_process and not (self._gate.is_closed or self._gate.is_paused or is_me)

    def _pause(self, wait_seconds: float) -> bool:
        """End the thread and close the sockets; return whether nothing is under way any more."""
        self._gate.is_paused = True
        if self._gate.is_idle(wait_seconds):
            self._was_open = self._publisher is not None
            self._sockets.close(is_unused=self._publisher is None or self._publisher.stop(wait_seconds))
            return True
        return False

    def move(self, endpoints: Endpoints) -> None:
        """Go on at ``endpoints``: the aggregator has moved there."""
        before = self.endpoints
        if before == endpoints:
            return
        with self._gate:
            if self.endpoints == endpoints or not self._may_pause():
                return
            if self._pause(TIMEOUT_SECONDS):
                self.endpoints = self._sockets.endpoints = endpoints
                _log.info("tapes follows its aggregator to %s", endpoints.publish)
            self._reopen()
        if os.environ.get("TAPES_ADDR") == before.publish:
            os.environ["TAPES_ADDR"] = self.endpoints.publish
        _hand_down()

    def after_in_parent(self) -> None:
        super().after_in_parent()
        self._reopen()

    def _reopen(self) -> None:
        with self._gate:
            if self._was_open:
                self._publisher = None
                self._open()
            self._gate.is_paused = self._was_open = False

    def after_in_child(self) -> None:
        """Give the registry a session of the child's own, at the same address."""
        _of_parents.append(self)
        _attached.discard(self)
        attach(self.registry, self.endpoints)._open_shortly()

    def _request(self, form: str) -> Reply:
        """Return the reply to a read in ``form``; raises as `snapshot`."""
        forks.detect_fork()
        if not self.is_of_this_process:
            raise AggregatorUnavailable(
                "this process was forked after its registry was connected",
                remedy="call connect() after the fork, in every worker",
            )
        self.move(runtime_directory.current_place(self.endpoints))
        with self._gate.request():
            reply = threads.run_in_hub_pool(lambda: self._read_shared(form))
        if reply.status != "ok":
            reason = reply.payload.decode(errors="replace")
            raise AggregatorUnavailable(f"the aggregator could not answer ({reason})")
        return reply

    def _read_shared(self, form: str) -> Reply:
        return self._read(form) if form == NOTHING else self._shared.call(form, lambda: self._read(form))

    def _read(self, form: str) -> Reply:
        if form != NOTHING:
            self._open().producers.await_first()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with self._sockets.borrow() as socket:
            self._send_goodbyes(socket, deadline)
            number = next(self._correlations)
            for keyframe in (False, True):
                update = self._outbox.update(keyframe=keyframe)
                reply = request(self.endpoints, socket, Read(number, form, update), deadline)
                if reply.status != "behind":
                    break
            return reply

    def _send_goodbyes(self, socket: Socket, deadline: float) -> None:
        def send(update: Update) -> Reply:
            return request(self.endpoints, socket, Goodbye(next(self._correlations), update), deadline)

        self._goodbyes.send(self.endpoints, send)
