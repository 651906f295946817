"""A registry's connection to an aggregator: publishing, reading for the whole service, and leaving.

A read carries what this process holds, as a separate publication could be overtaken by it. It presumes that
the aggregator has everything published before; if some of that is still under way, the aggregator says so
and gets a keyframe. So a reader always sees its own events.

Leaving is a request too: the last values, acknowledged. If nobody answers they are left as a will beside the
socket. Every end of a process that `tapes.shutdown` knows leaves.

At a fork the parent holds still, so that no thread and no socket is in the middle of anything. The child
gets a connection of its own, which opens no descriptor before it is first used (`tapes.first_use`): until
then the child may close all descriptors, or become another program.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from math import inf

from tapes import forks, shutdown, threads
from tapes.distributed.protocol.messages import NOTHING, Goodbye, Merged, Read, Reply, Update
from tapes.distributed.protocol.wire import decode
from tapes.distributed.storage import runtime_directory, spool
from tapes.distributed.storage.locks import is_served
from tapes.distributed.transport.address import Endpoints, resolve
from tapes.distributed.transport.requests import MAX_WAIT_SECONDS, TIMEOUT_SECONDS, incarnation, request
from tapes.distributed.transport.socket_pool import SocketPool
from tapes.distributed.transport.sockets import Socket
from tapes.distributed.worker.late_flush import Late
from tapes.distributed.worker.outbox import Outbox
from tapes.distributed.worker.publisher import Publisher
from tapes.environment import is_disabled
from tapes.errors import AggregatorUnavailable, InvalidArgument, WireError
from tapes.metrics import State
from tapes.naming import Labels
from tapes.registry import Registry, default_registry
from tapes.session import Connection
from tapes.sharing import Shared
from tapes.snapshot import Snapshot

__all__ = ["ConnectedSession", "close", "connect", "leave"]

_HOLD_SECONDS = 0.25

_log = logging.getLogger("tapes.distributed")


def connect(registry: Registry, addr: str | None) -> None:
    """Attach a connection to ``registry``; nothing if this process has attached the same already."""
    if is_disabled():
        return
    endpoints = runtime_directory.current_place(resolve(addr))
    forks.detect_fork()
    registry.connect_when_used = None
    with _connecting:
        connection = registry._connection  # not by first use, whose lock is taken before this one
        if isinstance(connection, ConnectedSession) and connection.is_of_this_process:
            if not runtime_directory.is_same_service(connection.endpoints, endpoints):
                raise InvalidArgument(
                    "connect()", got=endpoints.publish, expected=f"{connection.endpoints.publish}, as before",
                    remedy="call close() first",
                )  # fmt: skip
        else:
            endpoints.check_key()
            connection = _attach(registry, endpoints)
            registry.first_use.sleep(connection.hurry)
        connection.open()
    if connection.endpoints != endpoints and is_served(endpoints):
        connection.move(endpoints)


def close(registry: Registry) -> None:
    """Say goodbye and detach the connection of ``registry``; nothing if there is none."""
    connection = registry.connection
    if isinstance(connection, ConnectedSession):
        connection.close()
        registry.connection = None
        _attached.discard(connection)
        _tell_spawned()


def leave(registry: Registry) -> None:
    """Say goodbye at the end of a process; what is recorded after that is handed over at once."""
    connection = registry.connection
    if isinstance(connection, ConnectedSession) and connection.is_of_this_process:
        endpoints = connection.endpoints
        late = Late(registry, lambda: ConnectedSession(registry, endpoints).close())
        late.begin(lambda: close(registry))


def _attach(registry: Registry, endpoints: Endpoints) -> ConnectedSession:
    connection = ConnectedSession(registry, endpoints)
    registry.connection = connection
    _attached.add(connection)
    _tell_spawned()
    return connection


def _tell_spawned() -> None:
    """Tell processes that this one will spawn; the address of the default registry comes first."""
    alive = [connection for connection in _attached if connection.is_of_this_process]
    default = [c.endpoints.publish for c in alive if c.registry is default_registry]
    others = [c.endpoints.publish for c in alive if c.registry is not default_registry]
    forks.hand_down([*(default or [""]), *others] if alive else [])


def _leave() -> None:
    for connection in list(_attached):
        if connection.is_of_this_process:
            try:
                leave(connection.registry)
            except Exception:
                _log.exception("tapes could not say goodbye")


def _renew_lock() -> None:
    global _connecting
    _connecting = threading.Lock()


_connecting = threading.Lock()
forks.renew_in_child(_renew_lock)
_attached: set[ConnectedSession] = set()
_abandoned: list[ConnectedSession] = []
"""Those of the parent, in a child: kept, as letting go of their sockets would touch what the parent uses."""
_unsaid: weakref.WeakKeyDictionary[Registry, list[Update]] = weakref.WeakKeyDictionary()

shutdown.register(_leave, shutdown.Phase.GOODBYE)


class ConnectedSession(Connection):
    """Publishes a registry to the aggregator at ``endpoints`` and asks that for the merged view.

    It has no thread and no descriptor before it is opened, by `open` or by a read.
    """

    def __init__(self, registry: Registry, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self.registry = registry
        self._aggregator = incarnation(endpoints)
        self._pid = os.getpid()
        self._changed = threads.Monitor()
        self._in_flight = 0
        self._closing = False
        self._held = self._stopped = False
        self._correlations = itertools.count(1)
        self._readers = SocketPool(endpoints)
        self._outbox = Outbox(registry)
        self._shared: Shared[Reply] = Shared(MAX_WAIT_SECONDS)
        self._publisher: Publisher | None = None
        self._opening = threads.RLock()

    def open(self) -> None:
        """Begin to publish, if that has not begun."""
        if self._publisher is None:
            with contextlib.suppress(AggregatorUnavailable), self._in_use():  # unless it is being closed
                self._open()

    def _open(self) -> Publisher:
        with self._opening:
            if self._publisher is None:
                self._outbox.begin(is_another_aggregator=self._meets_another)
                publisher = Publisher(self._readers, self.endpoints, self._outbox, self.move)
                publisher.start()
                self._publisher = publisher
            return self._publisher

    @property
    def _meets_another(self) -> bool:
        """Whether the aggregator is another one than when this connection was made."""
        return self._aggregator not in (None, incarnation(self.endpoints))

    def hurry(self) -> bool:
        """Publish the first values of this process at once; called when the first is recorded."""
        self.registry.first_use.wake = None
        if self._publisher is not None:
            self._publisher.hurry()
        return True

    @property
    def is_of_this_process(self) -> bool:
        """Whether this process made it, and not one that this one was forked from."""
        return self._pid == os.getpid()

    def published(self, series: tuple[str, Labels]) -> State | None:
        """Return the state of a series that was published last, ``None`` if none was."""
        return self._outbox.published(series)

    def published_version(self) -> int:
        """Return the number of the last publication."""
        return self._outbox.published_seq

    def request_ended(self, *, may_be_the_last: bool = False) -> None:
        """Publish at the end of a request, where no thread can do it, or in time."""
        if may_be_the_last:
            try:
                self.flush()
            except AggregatorUnavailable:
                leave(self.registry)  # into a file
            return
        self.open()
        if self._publisher is not None:
            self._publisher.request_ended()

    def snapshot(self) -> Snapshot:
        """Return the merged view.

        Raises:
            AggregatorUnavailable: If the aggregator doesn't answer within a second.
        """
        payload = self.render("states")
        try:
            merged = decode(payload, most=inf)
        except WireError as error:
            raise AggregatorUnavailable(f"the aggregator's answer can't be used ({error})") from error
        if not isinstance(merged, Merged):
            raise AggregatorUnavailable(f"the aggregator's answer can't be used ({type(merged).__name__})")
        return merged.snapshot()

    def render(self, form: str) -> bytes:
        """Return the merged view, written by the aggregator; raises as `snapshot`."""
        return self._ask(form).payload

    def flush(self) -> None:
        """Hand over what was recorded, and wait until the aggregator has it; raises as `snapshot`."""
        self._ask(NOTHING)

    def close(self) -> None:
        """Stop publishing, and hand over the last values; takes 1 s at most if nobody answers.

        What was handed over is no longer here: the registry starts again from zero. If nobody acknowledges
        it, it is left as a will, kept, and handed over by the next connection of this registry.
        """
        if not self.is_of_this_process:
            return
        self._follow()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with self._changed:
            if self._closing:
                return
            self._changed.wait_for(lambda: not self._held, TIMEOUT_SECONDS)
            self._closing = True
            idle = self._changed.wait_for(lambda: not self._in_flight, TIMEOUT_SECONDS)
        publisher = self._publisher
        if publisher is None:
            self._outbox.begin(is_another_aggregator=self._meets_another)
        ended = publisher is None or publisher.stop(max(0.0, deadline - time.monotonic()))
        farewell = self._outbox.farewell()
        if publisher is None or not publisher.is_subscribed:
            farewell = self._outbox.for_another(farewell)
        unsaid = _unsaid.setdefault(self.registry, [])
        if publisher is not None or farewell.has_something:
            unsaid.append(farewell)
        if not unsaid:
            return
        try:
            with self._readers.borrow() as reader:
                self._say_goodbyes(reader, deadline)
        except AggregatorUnavailable:
            unsaid[:] = [self._outbox.for_another(u) if u is farewell else u for u in unsaid]
        # The sockets close first, as a file needs a descriptor.
        self._readers.close(is_unused=ended and (idle or not self._in_flight))
        spool.write_all(self.endpoints, [Goodbye(0, update) for update in unsaid])

    def before_fork(self) -> None:
        """Hold still: end the thread and close the sockets, unless somebody is using them."""
        with self._changed:
            if self._may_hold():
                self._hold(_HOLD_SECONDS)

    def _may_hold(self) -> bool:
        is_me = self._publisher is not None and self._publisher.is_me()
        return self.is_of_this_process and not (self._closing or self._held or is_me)

    def _hold(self, wait_seconds: float) -> bool:
        """Hold still; return whether nothing of it is under way any more."""
        self._held = True
        if self._changed.wait_for(lambda: not self._in_flight, wait_seconds):
            self._stopped = self._publisher is not None
            self._readers.close(is_unused=self._publisher is None or self._publisher.stop(wait_seconds))
            return True
        return False

    def move(self, endpoints: Endpoints) -> None:
        """Go on at ``endpoints``, where the aggregator of this service is by now."""
        before = self.endpoints
        with self._changed:
            if self.endpoints == endpoints or not self._may_hold():
                return
            if self._hold(TIMEOUT_SECONDS):
                self.endpoints = self._readers.endpoints = endpoints
                _log.info("tapes follows its aggregator to %s", endpoints.publish)
            self.after_in_parent()
        if os.environ.get("TAPES_ADDR") == before.publish:
            os.environ["TAPES_ADDR"] = self.endpoints.publish
        _tell_spawned()

    def _follow(self) -> None:
        place = runtime_directory.current_place(self.endpoints)
        if place != self.endpoints:
            self.move(place)

    def after_in_parent(self) -> None:
        """Open again what `before_fork` closed."""
        with self._changed:
            if self._stopped:
                self._publisher = None
                self._open()
            self._held = self._stopped = False

    def after_in_child(self) -> None:
        """In a forked child, attach a connection of its own; it opens when it is first used."""
        _abandoned.append(self)
        _attached.discard(self)
        _attach(self.registry, self.endpoints)

    def _ask(self, form: str) -> Reply:
        """Return the answer to a question for ``form``; raises as `snapshot`."""
        forks.detect_fork()
        if not self.is_of_this_process:
            raise AggregatorUnavailable(
                "this process was forked after its registry was connected",
                remedy="call connect() after the fork, in every worker",
            )
        self._follow()
        with self._in_use():
            reply = threads.run_in_hub_pool(lambda: self._read_shared(form))
        if reply.status != "ok":
            raise AggregatorUnavailable(
                f"the aggregator could not answer ({reply.payload.decode(errors='replace')})"
            )
        return reply

    def _read_shared(self, form: str) -> Reply:
        return self._read(form) if form == NOTHING else self._shared.call(form, lambda: self._read(form))

    def _read(self, form: str) -> Reply:
        if form != NOTHING:
            self._open().await_producers()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with self._readers.borrow() as reader:
            self._say_goodbyes(reader, deadline)
            number = next(self._correlations)
            for keyframe in (False, True):
                update = self._outbox.update(keyframe=keyframe)
                reply = request(self.endpoints, reader, Read(number, form, update), deadline)
                if reply.status != "behind":
                    break
            return reply

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep it from being held still or closed within the block.

        Raises:
            AggregatorUnavailable: If it is being closed, or held still for too long.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._held, TIMEOUT_SECONDS)
            if self._closing or self._held:
                raise AggregatorUnavailable("the connection is being closed")
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1

    def _say_goodbyes(self, reader: Socket, deadline: float) -> None:
        unsaid = _unsaid.get(self.registry, [])
        while unsaid:
            update = unsaid[0]
            goodbye = Goodbye(next(self._correlations), update)
            if request(self.endpoints, reader, goodbye, deadline).status != "ok":
                raise AggregatorUnavailable("the aggregator refused a goodbye")
            spool.discard(self.endpoints, goodbye)
            with contextlib.suppress(ValueError):  # another reader may have said it too, which is harmless
                unsaid.remove(update)
