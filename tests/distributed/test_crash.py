"""The aggregator is killed, by a real SIGKILL: another one takes its place and knows what it knew."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import time

import pytest

from tapes.clock import TICK_SECONDS, tick_at
from tests.contrib.services import Service, gone_requests, has_ended
from tests.distributed import crashing
from tests.processes import ROOT, children, get, wait_for

WORKERS, CHILDREN, EVENTS = 16, 64, 150
ANSWERS_SECONDS = 5.0
"""So long at most until all is told exactly again."""
LOST_SECONDS = 2.0
"""What a worker recorded so long before it was killed together with the aggregator may be lost."""


class Crashed:
    """A service of `tests.distributed.crashing`, and its aggregator."""

    def __init__(self, home, scenario: str, form: str = "", *arguments: int) -> None:
        self.home = home
        self.form = form
        self._command = [sys.executable, crashing.__file__, scenario, form, *map(str, arguments)]

    def running(self):
        return self.home.running(self._command, PYTHONPATH=str(ROOT))

    @property
    def lock(self) -> pathlib.Path:
        if self.form == "by hand":
            return self.home.directory / "m.ipc.lock"
        (service,) = self.home.services() or [self.home.directory]
        return service / "metrics.ipc.lock"

    def aggregator(self, but: int = 0) -> int:
        """Return the pid of the aggregator, which is not ``but``."""

        def another():
            pid = crashing.aggregator(self.lock)
            return pid if pid != but else 0

        return wait_for(another, "there is an aggregator", every=0.001)

    def kill(self, *others: int, but: int = 0) -> tuple[int, float]:
        """Kill the aggregator, and others at once; return its pid, and when that was."""
        pid = self.aggregator(but)
        for victim in (pid, *others):
            os.kill(victim, signal.SIGKILL)
        return pid, time.monotonic()

    def said(self, name: str):
        """Return what the service wrote into a file."""
        return crashing.read(self.home.directory / name)

    def tell(self, name: str) -> None:
        """Make a file that the service looks for."""
        (self.home.directory / name).touch()

    def events(self, name: str = "*"):
        return crashing.events(self.home.directory, name)

    def starts(self) -> int:
        """Return how many aggregators workers have started in place of another."""
        path = self.home.directory / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def output(self) -> str:
        return (self.home.directory / "output.log").read_text(errors="replace")

    def exact(self, since: float, logged=None):
        """Return what a process of the service was shown, if that is exactly what was recorded."""
        shown = self.said("shown")
        if not shown or shown["asked"] < since or tick_at(shown["asked"]) != tick_at(shown["answered"]):
            return None
        logged = logged or self.events()
        found = [shown["c"]["value"], *(shown[name]["count"] for name in "mht")]
        return shown if found == [len(logged)] * 4 else None

    def wait_until_exact(self, since: float, logged=None) -> dict:
        """Return what is shown when it is exact; check that this is soon enough."""
        patience = since + ANSWERS_SECONDS - time.monotonic()
        return wait_for(
            lambda: self.exact(since, logged), f"{len(logged or self.events())} events are counted", patience
        )


@pytest.fixture
def crashed(home):
    """Makes a service; nothing of it is left in the end, wherever it met."""
    yield lambda *arguments: Crashed(home, *arguments)
    wait_for(lambda: not list(home.directory.glob("m.ipc*")), "no file is left", 4)


def check_as_one(shown: dict, logged, least_ticks: int = 4) -> None:
    """All that is shown is what one registry would show that had seen every event."""
    expected = crashing.in_one_registry(logged, tick_at(shown["asked"]) * TICK_SECONDS)
    assert len({tick_at(event.seconds) for event in logged}) >= least_ticks
    assert expected["m"]["m1"] > 0
    for name in "cmht":
        for field, value in expected[name].items():
            if field in ("m1", "m5", "m15", "mean", "stddev"):
                value = pytest.approx(value, rel=1e-9)
            assert shown[name][field] == value, (name, field)


@pytest.mark.parametrize("form", ["joined", "by hand"])
def test_three_kills_under_load_and_one_when_all_workers_have_left(crashed, form):
    """Counts, rates and distributions are those of one process that was never disturbed.

    64 children come and go, sixteen at a time, of which a quarter live for milliseconds; one more reads all
    the time. The second kill meets the next aggregator while it takes over. Then the parent is alone, the
    aggregator is killed again, and all there is comes from the journal.
    """
    service = crashed("load", form, WORKERS, CHILDREN, EVENTS)
    with service.running() as process:
        wait_for(lambda: (service.said("ended") or 0) >= 8, "workers come and go", 20)
        first, _ = service.kill()
        second, _ = service.kill(but=first)
        wait_for(lambda: service.said("ended") >= 32, "workers come and go", 20)
        wait_for(lambda: service.output().count(" listens at ") >= 2, "another aggregator answers")
        third, _ = service.kill(but=second)
        loaded = wait_for(lambda: service.said("loaded"), "all workers have left", 30)
        alone = wait_for(lambda: service.said("alone"), "the parent is alone")
        logged = service.events()
        shown = service.wait_until_exact(loaded, logged)
        soon = shown["answered"] - loaded
        assert (shown["left"], shown["g"]["value"]) == (CHILDREN + 1, 7)
        check_as_one(shown, logged)

        fourth, killed = service.kill(but=third)
        shown = service.wait_until_exact(killed, logged)
        later = shown["answered"] - killed
        assert (shown["left"], shown["g"]["value"]) == (CHILDREN + 1, 7)
        assert sum(shown["own"].values()) == len(logged)
        check_as_one(shown, logged)
        fifth = service.aggregator(but=fourth)
        service.tell("end")
        assert process.wait(10) == 0
    assert len({first, second, third, fourth, fifth}) == 5
    watched = service.said("watched")
    print(f"{len(logged)} events; exact {soon:.2f} s after the load, {later:.2f} s after the last kill; "
          f"{watched}, alone after {alone - loaded:.2f} s")  # fmt: skip
    assert watched["wrong"] == []
    assert watched["reads"] > 20
    output = service.output()
    assert "Traceback" not in output
    if form == "joined":
        # One serves for each kill; a child that leaves while it starts one leaves that to another, too.
        assert 4 <= service.starts() <= 6
    else:
        assert output.count("another one is started") == 4
    assert output.count("takes the place of one that ended") in (3, 4)  # the second may not have come so far


def test_the_next_worker_of_a_parent_that_only_supervises(crashed):
    """No worker lives when the aggregator is killed; the next one finds the totals of those that left."""
    service = crashed("supervise")
    with service.running() as process:
        wait_for(lambda: service.said("loaded"), "the workers have left", 20)
        before = service.events()
        assert len(before) == 400
        pid, _ = service.kill()
        wait_for(lambda: has_ended(pid), "the aggregator has ended")
        since = time.monotonic()
        service.tell("come")
        wait_for(lambda: len(service.events()) == 401, "another worker has come")
        shown = service.wait_until_exact(since)
        print(f"exact {shown['answered'] - since:.2f} s after the next worker came")
        assert shown["left"] == 4
        check_as_one(shown, service.events(), 2)
        assert service.starts() == 1
        service.tell("end")
        assert process.wait(10) == 0


def test_the_next_worker_of_gunicorn(short_dir):
    """Its only worker leaves, then the aggregator is killed, and only then gunicorn starts another worker."""
    service = Service(short_dir, ["-w", "1", "--log-level", "warning"])
    with service.running() as master:
        service.wait_until_up()
        for _ in range(50):
            get(service.port, "/old-catalogue")
        (worker,) = children(master.pid)
        (private,) = service.private.glob("tapes-*")
        pid = crashing.aggregator(private / "metrics.ipc.lock")
        os.kill(master.pid, signal.SIGSTOP)
        try:
            os.kill(worker, signal.SIGTERM)
            wait_for(lambda: has_ended(worker), "the worker has left")
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: has_ended(pid), "the aggregator has ended")
        finally:
            os.kill(master.pid, signal.SIGCONT)
        wait_for(lambda: children(master.pid) - {worker}, "another worker starts")
        get(service.port, "/old-catalogue")
        since = time.monotonic()
        wait_for(lambda: gone_requests(service.port) == 51, "all is counted", ANSWERS_SECONDS)
        print(f"exact {time.monotonic() - since:.2f} s after the first request")
    assert "tapes can't" not in service.output()
    wait_for(service.nothing_left, "nothing is left", 4)


@pytest.mark.parametrize("form", ["joined", "by hand"])
def test_the_aggregator_and_a_worker_at_once(crashed, form):
    """That worker loses what it recorded in its last two seconds at most, the others nothing."""
    service = crashed("victims", form, 4)
    with service.running() as process:
        # Longer than what may be lost, so that losing all of it would be noticed.
        wait_for(
            lambda: (found := service.events("0")) and found[-1].real - found[0].real > LOST_SECONDS + 1,
            "the workers have recorded for a while",
        )
        victim = service.said("pids")[0]
        pid, killed = service.kill(victim)
        others = {n: len(service.events(str(n))) for n in (1, 2, 3)}
        wait_for(lambda: all(len(service.events(str(n))) > others[n] for n in others), "the others go on")
        service.aggregator(but=pid)
        service.tell("stop")
        own = service.events("0")
        sure = sum(event.real < killed - LOST_SECONDS for event in own)
        assert 0 < sure < len(own)

        def settled():
            shown = service.said("shown")
            if shown["asked"] < killed:
                return None
            found = {n: shown["own"].get(f'{{number="{n}"}}') for n in range(4)}
            if any(found[n] != len(service.events(str(n))) for n in others):
                return None
            return found, shown

        found, shown = wait_for(settled, "the others' events are counted", ANSWERS_SECONDS)
        assert sure <= found[0] <= len(own)
        every = sum(found.values())
        assert [shown["c"]["value"], *(shown[name]["count"] for name in "mht")] == [every] * 4
        lost = f"{len(own) - found[0]} of {len(own)} lost, {len(own) - sure} may be"
        print(f"{lost}; exact {shown['answered'] - killed:.2f} s after the kill")
        service.tell("end")
        assert process.wait(10) == 0
