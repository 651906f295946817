"""Which workers have exited: by their pids, or, in another pid namespace, by the heartbeat timeout.

A worker that has exited is *dead* for a while before it is retired: its last update may still be on its way,
and a child that was forked from it may bring a record of it. An ancestor stays for as long as a live worker
descends from it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapes import processes
from tapes.distributed.aggregator.entries import Worker
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol.messages import HEARTBEAT_TIMEOUT_SECONDS, Update
from tapes.processes import ProcessWatch

_LAST_UPDATE_SECONDS = 2.0  # how long after the death of a worker its messages may still arrive
_LAST_RECORD_SECONDS = 600.0  # how long a forked child may take to report what its dead parent had recorded
_MAX_DEAD = 1000


class Reaper:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._host = processes.host_id()
        self._watches: dict[bytes, ProcessWatch] = {}
        self._updated: set[bytes] = set()
        self._last_updates: dict[bytes, float] = {}
        self._dead: dict[bytes, float] = {}
        self._replaced: set[bytes] = set()

    def note(self, update: Update, *, is_new: bool) -> None:
        self._updated.add(update.identity)
        # The process of a new worker may have become another program; then workers before it have exited.
        for former in self._ledger.former_selves(update) if is_new else ():
            self._replaced.add(former)
            self._ledger.mark_dead(former)

    def exited(self, workers: dict[bytes, Worker], now: float) -> set[bytes]:
        exited = {identity for identity, worker in workers.items() if self.has_exited(worker, now)}
        self._updated.clear()
        return exited

    def has_exited(self, worker: Worker, now: float) -> bool:
        identity = worker.identity
        if identity in self._replaced:
            return True
        if worker.host != self._host:
            if identity in self._updated or identity not in self._last_updates:
                self._last_updates[identity] = now
                if self._dead.pop(identity, None) is not None:
                    self._ledger.mark_alive(identity)
            return now - self._last_updates[identity] > HEARTBEAT_TIMEOUT_SECONDS
        if identity not in self._watches:
            self._watches[identity] = ProcessWatch(worker.process, worker.program)
        return self._watches[identity].ended()

    def is_newly_dead(self, exited: set[bytes]) -> bool:
        """Return whether one of the ``exited`` workers was alive at the last look."""
        return bool(exited - self._dead.keys() - (self._ledger.ancestors() if exited else set()))

    def due(self, exited: set[bytes], workers: dict[bytes, Worker], now: float) -> Iterator[Worker]:
        """Mark ``exited`` workers dead; yield those to be retired now."""
        needed = self._ledger.ancestors() if exited else set()
        for identity in exited & needed:
            self._dead.pop(identity, None)
        for identity in exited - needed:
            self._ledger.mark_dead(identity)
            patience = _LAST_RECORD_SECONDS if workers[identity].is_ancestor else _LAST_UPDATE_SECONDS
            if identity not in self._watches and identity not in self._replaced:
                patience = float("inf")  # it may come back
            if now - self._dead.setdefault(identity, now) >= patience or len(self._dead) > _MAX_DEAD:
                yield workers[identity]

    def forget(self, identity: bytes) -> None:
        self._dead.pop(identity, None)
        self._last_updates.pop(identity, None)
        self._replaced.discard(identity)
        if identity in self._watches:
            self._watches.pop(identity).close()
