"""How long an aggregator lives.

An aggregator serves *owners* (the process that started it, the service's root process, processes
that attached) and the workers that publish to it. It watches all of them and lives until they have exited,
and a grace period longer, as last updates may be on their way and another worker may be about to start.
During the grace period it is *idle*: its reporters hold no port that the next start of the service needs.

Owners in other pid namespaces can't be watched from here, so an aggregator does not stay for them. The
journal keeps them, as the next aggregator may start in their namespace.
"""

from __future__ import annotations

from collections import OrderedDict

from tapes import processes
from tapes.distributed.protocol.messages import Attach
from tapes.processes import Process, ProcessWatch

_OWNED_GRACE_SECONDS = 0.5
_OWNED_PATIENCE_SECONDS = 1.0
_JOINED_GRACE_SECONDS = 2.0
_MAX_ELSEWHERE = 1000  # maximum number of remembered owners in other pid namespaces


class Lifetime:
    """How long an aggregator lives.

    Args:
        owners: The processes that it serves; without any it lives until `request_stop`.
        grace_seconds: How long to stay after the last owner and worker.
        patience_seconds: How long to wait for workers that outlive the owners.
        is_stoppable: Whether `request_stop` has an effect.
    """

    def __init__(
        self,
        *owners: Process,
        grace_seconds: float = _OWNED_GRACE_SECONDS,
        patience_seconds: float = _OWNED_PATIENCE_SECONDS,
        is_stoppable: bool = True,
    ) -> None:
        self._host = processes.host_id()
        self._watches = {owner: ProcessWatch(owner) for owner in owners}
        self._elsewhere: OrderedDict[tuple[str, Process], None] = OrderedDict()
        self._grace_seconds, self._patience_seconds = grace_seconds, patience_seconds
        self._is_stoppable = is_stoppable
        self._stop_requested = False
        self._ownerless_since: float | None = None
        self._idle_since: float | None = None
        self.has_owner = bool(owners)
        self.is_joined = not is_stoppable

    @property
    def is_idle(self) -> bool:
        """Whether the grace period has begun, as no owner and no worker is alive."""
        return self._idle_since is not None

    @property
    def owners(self) -> tuple[Process, ...]:
        """The owners of this pid namespace."""
        return tuple(self._watches)

    @property
    def owners_elsewhere(self) -> list[Attach]:
        """The requests by which owners of other pid namespaces attached, one for each namespace."""
        by_host: dict[str, list[Process]] = {}
        for host, process in self._elsewhere:
            by_host.setdefault(host, []).append(process)
        return [Attach(0, host, tuple(its_owners)) for host, its_owners in by_host.items()]

    @classmethod
    def joined(cls, *owners: Process) -> Lifetime:
        """Return the lifetime of an aggregator that can't be stopped: it lives as long as what it serves."""
        return cls(
            *owners, grace_seconds=_JOINED_GRACE_SECONDS, patience_seconds=float("inf"), is_stoppable=False
        )

    def request_stop(self) -> None:
        """End it as if the owners had exited; no effect on an aggregator that several processes share."""
        self._stop_requested = self._is_stoppable

    def attach(self, host: str, owners: tuple[Process, ...]) -> None:
        """Make processes of ``host`` owners, too; of very many elsewhere the oldest are forgotten.

        An aggregator without owners goes on without those of this namespace.
        """
        for owner in owners:
            if host != self._host:
                self._elsewhere[host, owner] = None
            elif self.has_owner and owner not in self._watches:
                self._watches[owner] = ProcessWatch(owner)
                self._ownerless_since = self._idle_since = None
        while len(self._elsewhere) > _MAX_ELSEWHERE:
            self._elsewhere.popitem(last=False)

    def detach(self, host: str, owner: Process) -> None:
        self._elsewhere.pop((host, owner), None)

    def expired(self, now: float, workers: int) -> bool:
        """Return whether it is over at ``now``, with that number of live workers."""
        for owner, watch in list(self._watches.items()):
            if watch.ended():
                watch.close()
                del self._watches[owner]
        if not self._stop_requested and (self._watches or not self.has_owner):
            return False
        if self._ownerless_since is None:
            self._ownerless_since = now
        if workers:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._idle_since is not None and now - self._idle_since >= self._grace_seconds:
            return True
        return now - self._ownerless_since >= self._patience_seconds
