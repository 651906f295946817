"""The public classes: the registry of a worker, and the aggregator of a service.

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
from typing import TYPE_CHECKING, Any

from tapes import forks, processes
from tapes.catalogue import MAX_SERIES
from tapes.clock import Clock, monotonic
from tapes.distributed import connection
from tapes.distributed.storage.locks import is_served
from tapes.distributed.supervision.process_title import set_title
from tapes.distributed.supervision.readiness import Readiness
from tapes.distributed.supervision.supervisor import Supervisor
from tapes.distributed.transport.address import DEFAULT_ADDR, resolve
from tapes.environment import connected_parent, is_disabled
from tapes.errors import InvalidArgument, TapesError
from tapes.registry import Registry
from tapes.reporting import Reporter
from tapes.session import LazySession

if TYPE_CHECKING:
    from tapes.distributed.aggregator.server import Aggregator

__all__ = ["DistributedRegistry", "RegistryAggregator"]

_STOP_SECONDS = 3.0  # maximum time that `RegistryAggregator.stop` takes


def _import_main() -> Any:
    """Return the module of the aggregator's process, which a worker never loads."""
    return forks.import_module("tapes.distributed.aggregator.main")


class DistributedRegistry(Registry):
    """A registry that publishes its metrics, once connected, and answers for the whole service.

    Before `connect`, and after `close`, it is a plain `Registry`.

    Args:
        socket_addr: Where the aggregator listens: ``ipc://PATH``, or ``tcp://HOST:PORT``; a host beyond
            loopback needs ``TAPES_CURVE_KEY``. The default means ``TAPES_ADDR`` from the environment, if that
            is set. A relative path is resolved now, in the working directory.
        prefix, labels, clock, max_series: As `Registry`.

    Raises:
        AddressError: If the address can't be used.
    """

    def __init__(
        self, socket_addr: str = DEFAULT_ADDR, *, prefix: str = "", labels: Mapping[str, Any] | None = None,
        clock: Clock = monotonic, max_series: int = MAX_SERIES,
    ) -> None:  # fmt: skip
        super().__init__(prefix=prefix, labels=labels, clock=clock, max_series=max_series)
        self.socket_addr = resolve(socket_addr).publish
        if self.socket_addr in connected_parent():
            self.use(LazySession(self, None, self.connect))  # the process that spawned this one was

    def connect(self) -> None:
        """Connect to the aggregator; call it in every worker, after the fork.

        Returns at once, even if the aggregator is not running yet. Does nothing if connected already.
        Processes that this one forks or spawns connect automatically.
        """
        connection.connect(self, self.socket_addr)

    def close(self) -> None:
        """Send the last values to the aggregator and disconnect; do nothing if not connected.

        The aggregator keeps these counts, so this registry starts again from zero; gauges keep their values.
        Takes at most 1 s, if the aggregator doesn't answer.
        """
        self.session.close()


class RegistryAggregator:
    """Merges the metrics of all connected registries, and runs reporters that report the result.

    Args:
        reporter: One reporter, several, or ``[]``; each one's registry is the merged view.
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
                    "the aggregator's reporter", got=given, expected="a Reporter, or a list of them",
                    remedy="pass [] for none: connected registries can be read without one",
                )  # fmt: skip
        self.socket_addr = resolve(socket_addr).publish
        self._pid = self._owner_pid = 0
        self._aggregator: Aggregator | None = None

    def start(self, fork: bool = True) -> None:
        """Start to listen and to report; call it before workers are forked.

        The forked aggregator ignores the terminal's interrupts, and exits with the process that started it.
        If it dies earlier, another one replaces it, with the same totals.

        Args:
            fork: Run in a child process and return when that is ready. If ``False``, run in this process, and
                return when it is interrupted, terminated, or stopped from another thread. Such an aggregator
                is not restarted if it dies.

        Raises:
            AddressInUse, AddressError: If its address, or that of a reporter, can't be bound.
            AggregatorUnavailable: If it can't start for another reason.
        """
        if is_disabled():
            return
        if self._pid or self._aggregator:
            raise InvalidArgument("start() was called twice", expected="a stop() before the next start()")
        if not fork:
            main = _import_main()
            self._aggregator = main.Aggregator(resolve(self.socket_addr), self.reporters, main.Lifetime())
            try:
                self._aggregator.run()
            finally:
                self._aggregator = None
            return
        readiness, main = Readiness(), _import_main()
        owner = forks.this_process()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = forks.fork_helper()
        if self._pid == 0:
            self._run_in_child(main, owner, readiness)
        self._owner_pid = owner.pid
        try:
            readiness.wait()
        except TapesError:
            self.stop()
            raise

    def stop(self) -> None:
        """End the aggregator after it has received the last messages of workers; do nothing if not started.

        Takes at most 3 s.
        """
        if self._aggregator is not None:
            self._aggregator.stop()
        if not self._pid or self._owner_pid != os.getpid():
            return  # not started, or this process is a fork of the one that did
        pid, self._pid = self._pid, 0
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(pid, signal.SIGTERM)  # the aggregator too: its supervisor may have died
            deadline = time.monotonic() + _STOP_SECONDS
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
                time.sleep(0.01)
            while is_served(resolve(self.socket_addr)) and time.monotonic() < deadline:
                time.sleep(0.01)  # its supervisor had died before

    def _run_in_child(self, main: Any, owner: processes.Process, readiness: Readiness) -> None:
        """Run the supervisor, and end the process: the child must not run the code of its parent."""

        def run(readiness: Readiness, ends: bool) -> int:
            aggregator = main.Aggregator(resolve(self.socket_addr), self.reporters, main.Lifetime(owner))
            if ends:
                aggregator.stop()
            try:
                status: int = main.run_to_end(aggregator, readiness)
                return status
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
