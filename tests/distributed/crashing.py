"""A service whose aggregator is killed, and the values that it must show.

Run as a program, this module is the service. It logs every event before it records it, and it logs what it
reads. Time runs fast in it: events begin a while ago and catch up with the clock, so they are spread over
many ticks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import random
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import tapes
from tapes.clock import tick_at
from tapes.distributed.registry import RegistryAggregator
from tapes.distributed.supervision import restart
from tapes.distributed.supervision.rendezvous import ensure_aggregator
from tapes.errors import AggregatorUnavailable
from tapes.forks import this_process
from tapes.service import Service

PACE = 8
"""The speed of the events' time relative to the clock, until it has caught up."""
BEFORE_SECONDS = 45.0
"""Seconds between the first event's time and the clock at the start."""
_LOGGED = struct.Struct("<3d")
_OWN = ("tapes.messages", "tapes.publish.lag")
"""Metrics of the aggregator, which start from zero with each aggregator."""


class Event(NamedTuple):
    """A recorded event: its real time, its time by the service's clock, and its value."""

    real: float
    seconds: float
    value: float


class _Clock:
    """Shows when the last event happened. Metrics keep it, so forked children inherit it."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


_clock = _Clock()


class Recorder:
    """Records events in the default registry, each in every kind of metric, and logs them before that.

    Args:
        name: The name of the log.
        began: When the time of events began to run, by the clock.
        labels: The labels of a further counter.
    """

    def __init__(self, name: object, began: float, **labels: object) -> None:
        self._log = os.open(f"log-{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._began = began
        self._labels = labels

    def record(self, value: float) -> None:
        """Log an event and record it, at one moment."""
        real = time.monotonic()
        seconds = min(real, self._began - BEFORE_SECONDS + PACE * (real - self._began))
        if tick_at(seconds) > tick_at(_clock.seconds):
            tapes.histogram("h").collect()  # a histogram's values count as of their collection
        _clock.seconds = seconds
        os.write(self._log, _LOGGED.pack(real, seconds, value))
        tapes.counter("c").increment()
        tapes.counter("own", **self._labels).increment()
        tapes.meter("m").mark()
        tapes.histogram("h").update(value)
        tapes.timer("t").update(value)


def events(directory: pathlib.Path, name: str = "*") -> list[Event]:
    """Return the logged events in the order of time."""
    logs = [path.read_bytes() for path in directory.glob(f"log-{name}")]
    whole = [log[: len(log) // _LOGGED.size * _LOGGED.size] for log in logs]
    return sorted(Event(*logged) for log in whole for logged in _LOGGED.iter_unpack(log))


def in_one_registry(logged: list[Event], seconds: float) -> dict[str, dict[str, float]]:
    """Return what one registry that saw all these events when they happened shows at ``seconds``."""
    now = logged[0].seconds
    registry = tapes.Registry(clock=lambda: now)
    counter, meter = registry.counter("c"), registry.meter("m")
    histogram, timer = registry.histogram("h"), registry.timer("t")
    for event in logged:
        if tick_at(event.seconds) > tick_at(now):
            histogram.collect()
        now = event.seconds
        counter.increment()
        meter.mark()
        histogram.update(event.value)
        timer.update(event.value)
    histogram.collect()
    now = seconds
    return {name: dict(registry.get_stats()[name]) for name in "cmht"}


def aggregator(lock: pathlib.Path) -> int:
    """Return the pid of the aggregator that holds this lock, or held it last; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(lock.read_text().split()[0])
    return 0


def write(name: str, what: Any) -> None:
    """Write a file atomically."""
    draft = pathlib.Path(f".{name}-{os.getpid()}")
    draft.write_text(json.dumps(what))
    draft.replace(name)


def read(path: pathlib.Path) -> Any:
    """Return what `write` wrote, or ``None`` if there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(path.read_text())
    return None


def counts(snapshot: tapes.Snapshot) -> Iterator[tuple[str, float]]:
    """Yield values that must not decrease: counts, and the negative of the time at which a series began."""
    for family in snapshot:
        if family.name not in _OWN and family.kind != "gauge":
            for series in family.series:
                key = f"{family.name} {dict(series.labels)}"
                yield key, getattr(series, "value", getattr(series, "count", 0))
                yield f"{key} began", -series.created


def watch() -> None:
    """Read in a loop until the load is over, and write down every wrong result."""
    seen: dict[str, float] = {}
    wrong, reads, unavailable, longest, last = [], 0, 0, 0.0, time.monotonic()
    turns = tapes.counter("turns")
    while not pathlib.Path("loaded").exists():
        turns.increment()
        try:
            found = dict(counts(tapes.default_registry.snapshot()))
        except AggregatorUnavailable:
            unavailable += 1
            continue
        except Exception as error:
            wrong.append(repr(error))
            continue
        reads += 1
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        wrong += [(key, seen[key], found.get(key)) for key in seen if found.get(key, 0) < seen[key]]
        if found["turns {}"] != reads + unavailable:
            wrong.append(("turns", reads + unavailable, found["turns {}"]))
        seen = found
    write("watched", {"wrong": wrong[:20], "reads": reads, "unavailable": unavailable, "longest": longest})


def show_until_end() -> None:
    """Write down what this process reads, with the time of the read, again and again until ``end`` exists."""
    while not pathlib.Path("end").exists():
        asked = time.monotonic()
        try:
            stats = tapes.get_stats()
        except AggregatorUnavailable:
            continue
        own = {str(labels): one["value"] for labels, one in stats.get("own", {}).items()}
        workers = stats.tapes.workers['{state="retired"}'].value
        shown = {name: stats.get(name) for name in "cmhtg"}
        write("shown", {"asked": asked, "answered": time.monotonic(), "own": own, "left": workers, **shown})
        time.sleep(0.05)


def connect(form: str) -> None:
    """Join a service, start an aggregator by hand, or only make sure that the service has one."""
    if form == "joined":
        tapes.join()
    elif form == "by hand":
        RegistryAggregator([], "ipc://m.ipc").start()
        tapes.connect("ipc://m.ipc")
    else:  # the parent only supervises
        ensure_aggregator(Service(this_process(), "a test"))


def spawn(work: Any, *arguments: Any) -> int:
    """Return the pid of a child that runs ``work``."""
    pid = os.fork()
    if pid == 0:
        work(*arguments)
        sys.exit(0)
    return pid


def work_for_a_while(began: float, number: int, many: int) -> None:
    """Be a worker for about a second; every fourth worker runs for milliseconds."""
    source = random.Random(number)
    recorder = Recorder(number, began, number=number % 7)
    for turn in range(many):
        if turn % 10 == 5 and number % 4:
            time.sleep(0.05 + 0.02 * source.random())
        recorder.record(source.lognormvariate(-3, 1))


def load(form: str, workers: int, children: int, many: int) -> None:
    """Let children record ``many`` events each while one process reads; then show what the parent reads."""
    connect(form)
    began = time.monotonic()
    recorder = Recorder("parent", began, number="parent")
    recorder.record(1.0)
    tapes.gauge("g").set(7)
    watcher = spawn(watch)
    alive: set[int] = set()
    started = ended = 0
    while ended < children:
        while len(alive) < workers and started < children:
            alive.add(spawn(work_for_a_while, began, started, many))
            started += 1
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in alive:  # another child may have started an aggregator
            assert status == 0, status
            alive.remove(pid)
            ended += 1
            write("ended", ended)
        else:
            recorder.record(0.5)
            time.sleep(0.01)
    write("loaded", time.monotonic())
    assert os.waitpid(watcher, 0)[1] == 0
    write("alone", time.monotonic())
    show_until_end()


def work_until_stop(began: float, number: int) -> None:
    """Be a worker that records until ``stop`` exists."""
    recorder = Recorder(number, began, number=number)
    while not pathlib.Path("stop").exists():
        recorder.record(0.25)
        time.sleep(0.01)


def victims(form: str, workers: int) -> None:
    """Let children record until they are stopped or killed, and show what the parent reads."""
    connect(form)
    began = time.monotonic()
    pids = [spawn(work_until_stop, began, number) for number in range(workers)]
    write("pids", pids)
    show_until_end()
    for pid in pids:
        os.waitpid(pid, 0)


def supervise() -> None:
    """Let the parent only start workers: four that exit, and one that starts when ``come`` exists."""
    connect("supervised")
    began = time.monotonic()

    def work(number: int) -> None:
        tapes.connect()
        work_for_a_while(began, number, 100)

    def late() -> None:
        tapes.connect()
        Recorder("late", began, number=1).record(2.0)
        show_until_end()

    for pid in [spawn(work, number) for number in range(4)]:
        assert os.waitpid(pid, 0)[1] == 0
    write("loaded", time.monotonic())
    while not pathlib.Path("come").exists():
        time.sleep(0.01)
    assert os.waitpid(spawn(late), 0)[1] == 0


def _log_starts() -> None:
    """Log every start of another aggregator by a worker."""
    launch = restart.launch

    def launch_and_log(*arguments: Any, **more: Any) -> None:
        with open("starts", "a") as file:
            file.write(f"{os.getpid()}\n")
        launch(*arguments, **more)

    restart.launch = launch_and_log


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="[%(process)d] %(message)s")
    _log_starts()
    sys.setswitchinterval(5.0)  # so no fold that began before a tick takes an event of that tick
    tapes.default_registry.clock = _clock
    scenario, *given = sys.argv[1:]
    if scenario == "load":
        load(given[0], *map(int, given[1:]))
    elif scenario == "victims":
        victims(given[0], int(given[1]))
    else:
        supervise()
