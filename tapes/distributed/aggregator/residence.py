"""The files of an aggregator: its lock, its sockets and its journal.

They can go while the aggregator runs, as when a login session ends with its directory. Its connected workers
still reach it then, but no other process does. So it makes its files again, in the same place or, if its
directory is a private one, in another place where its service looks. If another aggregator serves one of
these places by then, this one hands over everything to it and exits.

In the end an aggregator leaves

    nothing                    if no process needs it any more
    its lock and its journal   to a successor, if it failed or made room
    the files of another one   that it has handed over to
"""

from __future__ import annotations

import contextlib
import logging
import os
from enum import Enum

import zmq

from tapes.distributed.aggregator.handler import Handler
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import Lock, is_served
from tapes.distributed.storage.start_lock import start_lock
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.requests import request_all
from tapes.distributed.transport.sockets import bind, bind_again
from tapes.errors import AddressError, TapesError

_log = logging.getLogger("tapes.distributed")


class Ends(Enum):
    UNNEEDED = "no process needs it"
    SUCCEEDED = "another one takes its place"
    HANDED_OVER = "another one has taken its place"


class Residence:
    """The files of an aggregator; ``endpoints`` is where it is by now."""

    updates: zmq.Socket[bytes]
    requests: zmq.Socket[bytes]

    def __init__(
        self, endpoints: Endpoints, handler: Handler, *, restartable: bool, supervised: bool
    ) -> None:
        self.endpoints = endpoints
        self._handler = handler
        self._lock = Lock(endpoints, restartable=restartable, supervised=supervised)
        self._start_lock = contextlib.ExitStack()

    @property
    def predecessor_crashed(self) -> bool:
        """Whether the lock was left by an aggregator that was killed or failed."""
        return self._lock.predecessor_crashed

    def lock(self) -> None:
        """Take the address; raises `AddressInUse` or `AddressError`."""
        runtime_directory.restore(self.endpoints, runtime_directory.User.ourselves())
        self._lock.acquire()

    def bind(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Bind the sockets; raises `AddressInUse` or `AddressError`."""
        self.updates, self.requests = bind(context, self.endpoints)

    def keep_out(self) -> bool:
        """Keep processes from starting an aggregator until `clear`; return whether none does so just now.

        Raises `AddressError` if the directory does not exist any more.
        """
        ourselves = runtime_directory.User.ourselves()
        is_held = self._start_lock.enter_context(start_lock(self.endpoints, ourselves, wait=False))
        if not is_held:
            self.let_in()
        return is_held

    def let_in(self) -> None:
        self._start_lock.close()

    def clear(self, end: Ends) -> None:
        journal = self._handler.journal
        with self._start_lock:
            if end is Ends.HANDED_OVER:
                journal.close()
                self._lock.close()
                return
            for path in self.endpoints.files:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            if end is Ends.SUCCEEDED:
                journal.close()
                self._lock.release(keep_file=True)
                return
            journal.remove()
            self._lock.release()
            runtime_directory.clear(self.endpoints)

    def look_after(self) -> bool:
        """Make removed files again; return whether it has handed over to another aggregator instead."""
        if self._lock.is_lost:  # then all files are made again
            return self._settle_again()
        self._handler.journal.look_after_files()
        if not all(map(os.path.lexists, self.endpoints.files)):
            with contextlib.suppress(AddressError):  # the next look tries again
                bind_again(self.updates, self.requests, self.endpoints, self.endpoints)
                _log.warning("tapes made its sockets at %s again, as one was removed", self.endpoints.publish)
        return False

    def _settle_again(self) -> bool:
        """Make all files again, there or elsewhere; return whether it has handed over instead."""
        places = [self.endpoints, *runtime_directory.other_places(self.endpoints)]
        # Its own lock is gone, so an aggregator that has one is another one.
        heir = next(filter(runtime_directory.has_aggregator, places), None)
        if heir is None:
            any(map(self._settle_at, places))
            return False
        try:
            if not request_all(heir, self._handler.inheritance()):  # nothing counts twice if it is sent again
                return False
        except (TapesError, zmq.ZMQError) as error:
            _log.warning("tapes can't hand over to the aggregator at %s yet: %s", heir.publish, error)
            return False
        here = self.endpoints.publish
        _log.warning("tapes found the files beside %s removed, and handed over to %s", here, heir.publish)
        return True

    def _settle_at(self, place: Endpoints) -> bool:
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
                    bind_again(self.updates, self.requests, self.endpoints, place)
                except AddressError:
                    lock.release()
                    raise
                self._lock.close()
                self._lock = lock
        except (OSError, TapesError):
            return False
        here = self.endpoints.publish
        _log.warning(
            "tapes found the files beside %s removed, and made them again at %s", here, place.publish
        )
        self.endpoints = place
        self._handler.settle(place)
        return True
