"""The service of `tests.soak`: a parent that forks workers and a thread that reads.

    python -m tests.soak_service SECONDS SEED

Workers write down what they record, and the reading thread writes down what it reads and every wrong result.
The parent replaces its workers on SIGHUP, and exits when a file named ``end`` exists.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import struct
import sys
import threading
import time
from typing import Any

import tapes
from tapes.errors import AggregatorUnavailable
from tests.distributed import crashing
from tests.processes import wait_for

MARK = struct.Struct("<dqq")
"""An entry of a worker's log: the time, how many events have begun, how many are done."""
KINDS, STEADY = 20, 7
"""The number of label sets of the counter, and the value of the gauge that the parent sets."""
_WORKERS = (4, 6)
_BATCH, _PAUSE_SECONDS, _MAX_BATCHES = 5, 0.04, 2000
_LIFE_SECONDS = (0.5, 20.0)
_received: set[tuple[int, int]] = set()
"""The signals that have arrived, each with the pid of its process."""


def work(number: int, killed: str, seconds: float) -> None:
    """Record events; log before a batch how many events will have begun, and after it how many are done."""
    log = os.open(f"log-{number}-{os.getpid()}-{killed}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(log, MARK.pack(time.monotonic(), 0, 0))
    counter = tapes.counter("c", kind=number % KINDS, killed=killed)
    tapes.gauge("alive").set(1)
    terminated, until = (os.getpid(), signal.SIGTERM), time.monotonic() + seconds
    for batch in range(_MAX_BATCHES):
        if terminated in _received or time.monotonic() > until:
            return
        done = batch * _BATCH
        os.write(log, MARK.pack(time.monotonic(), done + _BATCH, done))
        for event in range(done, done + _BATCH):
            counter.increment()
            tapes.timer("t", killed=killed).update(0.001 * (1 + event % 97))
            tapes.meter("m", killed=killed).mark()
        os.write(log, MARK.pack(time.monotonic(), done + _BATCH, done + _BATCH))
        time.sleep(_PAUSE_SECONDS)


def watch(seconds: float, ended: threading.Event) -> None:
    """Read in a loop; write down what was read, and every wrong result."""
    result: dict[str, Any] = {"reads": 0, "failed": 0, "longest": 0.0, "wrong": [], "less": []}
    seen: dict[str, float] = {}
    turns, until, last = tapes.counter("turns"), time.monotonic() + seconds, time.monotonic()
    missed_since = 0.0
    while not ended.wait(0.1) and time.monotonic() < until:
        turns.increment()
        asked = time.monotonic()
        try:
            snapshot = tapes.default_registry.snapshot()
        except AggregatorUnavailable:
            result["failed"] += 1
            missed_since = missed_since or asked
        except Exception as error:
            result["wrong"] = [*result["wrong"], repr(error)][:20]
        else:
            now = time.monotonic()
            result["reads"] += 1
            result["longest"] = max(result["longest"], now - missed_since if missed_since else 0.0)
            missed_since = 0.0
            found = dict(crashing.counts(snapshot))
            found = {key: count for key, count in found.items() if key[:2] in ("c ", "t ", "m ", "tu")}
            less = [(key, n, found.get(key, 0)) for key, n in seen.items() if found.get(key, 0) < n]
            result["less"] += [(last, now, *one) for one in less]
            del result["less"][50:]
            if found["turns {}"] != result["reads"] + result["failed"]:
                result["wrong"] = [*result["wrong"], f"not its own events: {found['turns {}']}"][:20]
            seen, last = found, now
            gauges = {one.name: one.series[0].value for one in snapshot if one.name in ("steady", "alive")}
            crashing.write("shown", {**result, "asked": asked, "counts": found, "gauges": gauges})


def serve(seconds: float, seed: int) -> None:
    """Be the parent. Forked workers return from here too."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, _: _received.add((os.getpid(), signum)))
    source, most = random.Random(seed), random.Random(seed).randint(*_WORKERS)
    tapes.join()
    tapes.gauge("steady").set(STEADY)
    ended = threading.Event()
    reader = threading.Thread(target=watch, args=(seconds + 60, ended))
    reader.start()
    alive: set[int] = set()
    terminated, reloaded = (os.getpid(), signal.SIGTERM), (os.getpid(), signal.SIGHUP)
    number, until = 0, time.monotonic() + seconds + 30
    while terminated not in _received and time.monotonic() < until:
        if len(alive) < most:
            number += 1
            killed = "yes" if source.random() < 0.3 else "no"
            life = 60.0 if killed == "yes" else source.uniform(*_LIFE_SECONDS) * source.random() + 0.5
            pid = os.fork()
            if pid == 0:
                work(number, killed, life)
                if number % 2:
                    sys.exit(0)
                return
            alive.add(pid)
        if reloaded in _received:
            _received.discard(reloaded)
            most = source.randint(*_WORKERS)
            _end_all(alive)
        _reap(alive)
        time.sleep(0.01)
    _end_all(alive)
    wait_for(lambda: _reap(alive), "the workers have ended", 15)
    crashing.write("loaded", time.monotonic())
    wait_for(pathlib.Path("end").exists, "the end", 60)
    ended.set()
    reader.join()


def _end_all(alive: set[int]) -> None:
    for pid in alive:
        os.kill(pid, signal.SIGTERM)


def _reap(alive: set[int]) -> bool:
    """Write down how workers have exited; return whether none is left."""
    for pid in list(alive):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            alive.discard(pid)
            with open("ended", "a") as file:
                file.write(f"{pid} {os.waitstatus_to_exitcode(status)}\n")
    return not alive


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
