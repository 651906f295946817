"""The two public faces: the registry of a worker, and the aggregator of a service.

RegistryAggregator(HTTPReporter(8889)).start()   # before the fork
…
registry.connect()                               # after it, in every worker
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tapes import forks, processes
from tapes.catalogue import MAX_SERIES
from tapes.clock import Clock, monotonic
from tapes.distributed import connection
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.aggregator.main import run_to_end
from tapes.distributed.aggregator.server import Aggregator
from tapes.distributed.storage.locks import is_served
from tapes.distributed.supervision.process_title import set_title
from tapes.distributed.supervision.readiness import Readiness
from tapes.distributed.supervision.supervisor import Supervisor
from tapes.distributed.transport.address import DEFAULT_ADDR, resolve
from tapes.environment import is_disabled
from tapes.errors import InvalidArgument, TapesError
from tapes.registry import Registry
from tapes.reporting import Reporter
from tapes.session import LazySession

__all__ = ["DistributedRegistry", "RegistryAggregator"]

_STOP_SECONDS = 3.0


class DistributedRegistry(Registry):
    """A registry that, once connected, publishes what it holds and answers for the whole service.

    Before `connect`, and after `close`, it is a plain `Registry`.

    Args:
        socket_addr: Where the aggregator listens: ``ipc://PATH``, or ``tcp://HOST:PORT``, beyond loopback
            with ``TAPES_CURVE_KEY`` only. The default stands for ``TAPES_ADDR`` from the environment, if that
            is set. A relative path is taken from the working directory of now.
        prefix, labels, clock, max_series: As `Registry`.

    Raises:
        AddressError: If the address can't be used.
    """

    def __init__(
        self,
        socket_addr: str = DEFAULT_ADDR,
        *,
        prefix: str = "",
        labels: Mapping[str, Any] | None = None,
        clock: Clock = monotonic,
        max_series: int = MAX_SERIES,
    ) -> None:
        super().__init__(prefix=prefix, labels=labels, clock=clock, max_series=max_series)
        self.socket_addr = resolve(socket_addr).publish
        if self.socket_addr in forks.connected_parent():
            self.use(LazySession(self, None, self.connect))  # the process that spawned this one was

    def connect(self) -> None:
        """Connect to the aggregator; call it in every worker, after the fork.

        Returns at once, also if the aggregator isn't there yet. Nothing if connected already. Processes that
        this one forks or spawns connect by themselves.
        """
        connection.connect(self, self.socket_addr)

    def close(self) -> None:
        """Hand the last values to the aggregator and disconnect; nothing if not connected.

        What was handed over is counted there, so this registry starts again from zero; gauges stay. Takes
        1 s at most, if the aggregator doesn't answer.
        """
        self.session.close()


class RegistryAggregator:
    """Adds up what all connected registries publish, and lets reporters report the sum.

    Args:
        reporter: One reporter or several, or ``[]``; each gets the merged view as its registry.
        socket_addr: Where to listen; see `DistributedRegistry`.

    Raises:
        AddressError: If the address can't be used.
    """

    def __init__(self, reporter: Reporter | Iterable[Reporter], socket_addr: str = DEFAULT_ADDR) -> None:
        several = isinstance(reporter, Iterable) and not isinstance(reporter, type)
        self.reporters: list[Any] = list(reporter) if several else [reporter]  # type: ignore[arg-type]
        for given in self.reporters:
            if not isinstance(given, Reporter):
                raise InvalidArgument(
                    "the aggregator's reporter",
                    got=given,
                    expected="a Reporter, or a list of them",
                    remedy="give [] for none: connected registries can be read without one",
                )
        self.socket_addr = resolve(socket_addr).publish
        self._pid = self._owner_pid = 0
        self._aggregator: Aggregator | None = None

    def start(self, fork: bool = True) -> None:
        """Start to listen and to report; call it before workers are forked.

        The forked aggregator ignores the terminal's interrupts and ends with the process that started it. If
        it dies before that, another one takes its place, which knows what it knew.

        Args:
            fork: Run in a child process and return when that is ready. If ``False``, run in this process
                and return when it is interrupted, terminated, or stopped from another thread; whoever runs
                the process has to start it again if it dies.

        Raises:
            AddressInUse, AddressError: If it can't bind its address, or a reporter can't bind its own.
            AggregatorUnavailable: If it can't be started for another reason.
        """
        if is_disabled():
            return
        if self._pid or self._aggregator:
            raise InvalidArgument("start() was called before", expected="one start() for each stop()")
        if not fork:
            self._aggregator = Aggregator(resolve(self.socket_addr), self.reporters, Lifetime())
            try:
                self._aggregator.run()
            finally:
                self._aggregator = None
            return
        readiness = Readiness()
        owner = forks.this_process()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = forks.fork_helper()
        if self._pid == 0:
            self._run_in_child(owner, readiness)
        self._owner_pid = owner.pid
        try:
            readiness.wait()
        except TapesError:
            self.stop()
            raise

    def stop(self) -> None:
        """End the aggregator, after it has taken in what workers still have to say; nothing if not started.

        Takes 3 s at most.
        """
        if self._aggregator is not None:
            self._aggregator.stop()
        if not self._pid or self._owner_pid != os.getpid():
            return  # not started, or started by a process that this one was forked from
        pid, self._pid = self._pid, 0
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(pid, signal.SIGTERM)  # the aggregator too, should its keeper have died
            deadline = time.monotonic() + _STOP_SECONDS
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
                time.sleep(0.01)
            while is_served(resolve(self.socket_addr)) and time.monotonic() < deadline:
                time.sleep(0.01)  # had its keeper died before

    def _run_in_child(self, owner: processes.Process, readiness: Readiness) -> None:
        """Never returns: the child must not run what belongs to its parent."""

        def run(readiness: Readiness, ends: bool) -> int:
            aggregator = Aggregator(resolve(self.socket_addr), self.reporters, Lifetime(owner))
            if ends:
                aggregator.stop()
            try:
                return run_to_end(aggregator, readiness)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()

        status = 1
        try:
            os.setsid()
            set_title(f"tapes aggregator supervisor {self.socket_addr}")
            status = Supervisor(run, owner).run(readiness)
        finally:
            os._exit(status)
