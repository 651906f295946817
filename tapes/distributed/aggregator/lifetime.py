"""How long an aggregator lives.

An aggregator serves *owners* (the process that started it, a supervisor such as gunicorn's master, whoever
asked it to stay) and the workers that it hears from. It watches all of them and lives until they have ended,
and a grace period longer, as last words may be under way and another worker may be about to start. During
the grace period it is *idle*: its reporters hold nothing that the next start of the service needs.
"""

from __future__ import annotations

from collections import OrderedDict

from tapes.distributed.protocol.messages import Attach
from tapes.processes import Process, ProcessWatch

__all__ = ["ForeignOwners", "Lifetime"]

_OWNED_GRACE_SECONDS = 0.5
_OWNED_PATIENCE_SECONDS = 1.0
_JOINED_GRACE_SECONDS = 2.0
_MAX_ELSEWHERE = 1000
"""Maximum number of owners of other pid namespaces that are remembered."""


class Lifetime:
    """How long an aggregator lives.

    Args:
        owners: The processes that it serves; none to live until told to stop.
        grace_seconds: How long to stay after the last owner and worker.
        patience_seconds: How long to wait for workers that outlive the owners.
        is_stoppable: Whether it ends when it is told to, before its owners do.
    """

    def __init__(
        self,
        *owners: Process,
        grace_seconds: float = _OWNED_GRACE_SECONDS,
        patience_seconds: float = _OWNED_PATIENCE_SECONDS,
        is_stoppable: bool = True,
    ) -> None:
        self._watches = {owner: ProcessWatch(owner) for owner in owners}
        self._grace_seconds = grace_seconds
        self._patience_seconds = patience_seconds
        self._can_be_stop_requested = is_stoppable
        self._stop_requested = False
        self._ownerless_since: float | None = None
        self._idle_since: float | None = None
        self.has_owner = bool(owners)
        self.is_joined = not is_stoppable

    @property
    def is_idle(self) -> bool:
        """Whether no owner and no worker lived at the last look: the grace period has begun."""
        return self._idle_since is not None

    @property
    def owners(self) -> tuple[Process, ...]:
        """The processes that it serves."""
        return tuple(self._watches)

    @classmethod
    def joined(cls, *owners: Process) -> Lifetime:
        """Return the lease of an aggregator that nobody ends: it lives as long as any of those it serves."""
        return cls(
            *owners, grace_seconds=_JOINED_GRACE_SECONDS, patience_seconds=float("inf"), is_stoppable=False
        )

    def request_stop(self) -> None:
        """Ask it to end as if the owners had ended; an aggregator that several share doesn't mind."""
        self._stop_requested = self._can_be_stop_requested

    def keep_alive_for(self, process: Process) -> None:
        """Live as long as ``process`` too, if this is the lease of an aggregator with owners."""
        if self.has_owner and process not in self._watches:
            self._watches[process] = ProcessWatch(process)
            self._ownerless_since = self._idle_since = None

    def expired(self, now: float, workers: int) -> bool:
        """Return whether it is over, given how many workers live at ``now``."""
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


class ForeignOwners:
    """Owners in other pid namespaces than this aggregator's.

    They can't be watched from here, so this aggregator does not live for them. They are for the journal: the
    next aggregator may be started in their namespace.

    Args:
        host: What pids mean here; see `tapes.processes.host_id`.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._owners: OrderedDict[tuple[str, Process], None] = OrderedDict()

    def add(self, host: str, processes: tuple[Process, ...]) -> None:
        """Remember ``processes`` of another ``host``; of too many, those that came first are forgotten."""
        for process in processes if host != self._host else ():
            self._owners[host, process] = None
        while len(self._owners) > _MAX_ELSEWHERE:
            self._owners.popitem(last=False)

    def discard(self, host: str, process: Process) -> None:
        """Forget a process that has ended, if it is known."""
        self._owners.pop((host, process), None)

    def hellos(self) -> list[Attach]:
        """Return them as they introduced themselves, one message for each host."""
        by_host: dict[str, list[Process]] = {}
        for host, process in self._owners:
            by_host.setdefault(host, []).append(process)
        return [Attach(0, host, tuple(processes)) for host, processes in by_host.items()]
