"""The program that an aggregator's process runs."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import sys
import time

from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.aggregator.server import Aggregator
from tapes.distributed.storage.runtime_directory import User
from tapes.distributed.storage.sweeping import sweep
from tapes.distributed.supervision.process_title import set_title
from tapes.distributed.supervision.readiness import Readiness
from tapes.distributed.supervision.supervisor import Supervisor
from tapes.distributed.transport.address import resolve
from tapes.errors import TapesError
from tapes.processes import Process, reaps
from tapes.reporting.configured import HTTP, STATSD, reporters_from

_log = logging.getLogger("tapes.distributed")


def run_to_end(aggregator: Aggregator, readiness: Readiness) -> int:
    """Run ``aggregator`` to its end, reporting on ``readiness`` how it started; return the exit status."""
    readiness.close_reader()
    _settle(aggregator)
    try:
        aggregator.run(lambda: readiness.report("ready"))
    except TapesError as error:
        if readiness.has_reported:
            _log.exception("tapes: the aggregator ended by an error")
        return _fail(readiness, f"{type(error).__name__}\n{error}")
    except Exception as error:
        _log.exception("tapes: the aggregator ended by an unexpected error")
        return _fail(readiness, f"AggregatorUnavailable\nthe aggregator failed ({error!r})")
    return 0


def _fail(readiness: Readiness, text: str) -> int:
    status = Readiness.CRASHED if readiness.has_reported else Readiness.NOT_READY
    readiness.report(text)
    return status


def _settle(aggregator: Aggregator) -> None:
    set_title(f"tapes aggregator {aggregator.title}")
    gc.set_threshold(50_000, 20, 50)  # states have no cycles, and there are many of them
    sys.setswitchinterval(0.0005)  # rendering must not hold up the loop
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a worker takes three descriptors


def serve(address: str, pid: str, started: str, reason: str, uid: str, gid: str, ready_fd: str) -> None:
    """Be the aggregator that `tapes.distributed.supervision.launch` starts; the caller ends at once."""
    starter, readiness = os.getpid(), Readiness((-1, int(ready_fd)))
    try:
        child = os.fork()
    except OSError as error:
        readiness.report(f"AggregatorUnavailable\nthe aggregator can't be started ({error.strerror})")
        os._exit(1)
    if child:
        os._exit(0)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="[%(process)d] [%(levelname)s] %(message)s"
    )
    _become(User(int(uid), int(gid)))
    os.umask(0o077)
    os.chdir("/")
    sweep()
    endpoints = resolve(address)
    try:
        configured = {name: os.environ[name] for name in (HTTP, STATSD) if os.environ.get(name)}
        reporters = reporters_from(configured)
    except TapesError as error:
        readiness.report(f"{type(error).__name__}\n{error}")
        sys.exit(1)
    owner, supervised = Process(int(pid), int(started)), not reaps(_adopter(starter))

    def run(readiness: Readiness, ends: bool = False) -> int:
        lifetime = Lifetime.joined(owner)
        aggregator = Aggregator(
            endpoints, reporters, lifetime, reason=reason, configured=configured, supervised=supervised
        )
        return run_to_end(aggregator, readiness)

    sys.exit(Supervisor(run, owner).run_while_killed(readiness) if supervised else run(readiness))


def _adopter(parent: int) -> int:
    """Return the process that becomes the parent of this one when ``parent`` has ended."""
    deadline = time.monotonic() + 1.0
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.001)
    return os.getppid()


def _become(user: User) -> None:
    if user != User.ourselves():
        os.setgroups([])
        os.setgid(user.gid)
        os.setuid(user.uid)
