"""The aggregator is killed by a real SIGKILL: another one takes its place and has all that it had."""

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

pytestmark = pytest.mark.alone  # they measure how soon all values are exact again

WORKERS, CHILDREN, EVENTS = 16, 64, 150
ANSWERS_SECONDS = 5.0
"""Maximum seconds until all values are exact again."""
LOST_SECONDS = 2.0
"""Maximum seconds of events that a worker loses that is killed together with the aggregator."""


class CrashingService:
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
        """Return the pid of the aggregator, once it is another one than ``but``."""

        def another():
            pid = crashing.aggregator(self.lock)
            return pid if pid != but else 0

        return wait_for(another, "another aggregator runs", every=0.001)

    def kill(self, *others: int, but: int = 0) -> tuple[int, float]:
        """Kill the aggregator, and other processes at once; return its pid, and when that was."""
        pid = self.aggregator(but)
        for victim in (pid, *others):
            os.kill(victim, signal.SIGKILL)
        return pid, time.monotonic()

    def read(self, name: str):
        """Return what the service wrote into a file."""
        return crashing.read(self.home.directory / name)

    def announce(self, name: str) -> None:
        """Create a file that the service waits for."""
        (self.home.directory / name).touch()

    def events(self, name: str = "*"):
        return crashing.events(self.home.directory, name)

    def starts(self) -> int:
        """Return how many aggregators workers have started in place of another one."""
        path = self.home.directory / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def output(self) -> str:
        return (self.home.directory / "output.log").read_text(errors="replace")

    def exact(self, since: float, logged=None):
        """Return what a process of the service shows, if that is exactly what was recorded."""
        shown = self.read("shown")
        if not shown or shown["asked"] < since or tick_at(shown["asked"]) != tick_at(shown["answered"]):
            return None
        logged = logged or self.events()
        found = [shown["c"]["value"], *(shown[name]["count"] for name in "mht")]
        return shown if found == [len(logged)] * 4 else None

    def wait_until_exact(self, since: float, logged=None) -> dict:
        """Return what is shown once it is exact, and assert that this is soon enough."""
        patience = since + ANSWERS_SECONDS - time.monotonic()
        return wait_for(
            lambda: self.exact(since, logged), f"{len(logged or self.events())} events are counted", patience
        )


@pytest.fixture
def service_of(home):
    """Return a function that makes a service; nothing of it is left in the end, wherever its socket was."""
    yield lambda *arguments: CrashingService(home, *arguments)
    wait_for(lambda: not list(home.directory.glob("m.ipc*")), "no file is left", 4)


def assert_as_one_registry(shown: dict, logged, least_ticks: int = 4) -> None:
    """Assert that all that is shown equals what one registry that had seen every event would show."""
    expected = crashing.in_one_registry(logged, tick_at(shown["asked"]) * TICK_SECONDS)
    assert len({tick_at(event.seconds) for event in logged}) >= least_ticks
    assert expected["m"]["m1"] > 0
    for name in "cmht":
        for field, value in expected[name].items():
            if field in ("m1", "m5", "m15", "mean", "stddev"):
                value = pytest.approx(value, rel=1e-9)
            assert shown[name][field] == value, (name, field)


@pytest.mark.parametrize("form", ["joined", "by hand"])
def test_values_after_kills_equal_those_of_one_undisturbed_registry(service_of, form):
    """After three kills under load and one later, all values are those of one undisturbed registry.

    64 children run, sixteen at a time, of which a quarter live for milliseconds; another one reads all the
    time. The second kill hits the next aggregator while it takes over. The last one happens when only the
    parent is left, so that all values come from the journal.
    """
    service = service_of("load", form, WORKERS, CHILDREN, EVENTS)
    with service.running() as process:
        wait_for(lambda: (service.read("ended") or 0) >= 8, "workers come and go", 20)
        first, _ = service.kill()
        second, _ = service.kill(but=first)
        wait_for(lambda: service.read("ended") >= 32, "workers come and go", 20)
        wait_for(lambda: service.output().count(" listens at ") >= 2, "another aggregator answers")
        third, _ = service.kill(but=second)
        loaded = wait_for(lambda: service.read("loaded"), "all workers have left", 30)
        alone = wait_for(lambda: service.read("alone"), "the parent is alone")
        logged = service.events()
        shown = service.wait_until_exact(loaded, logged)
        soon = shown["answered"] - loaded
        assert (shown["left"], shown["g"]["value"]) == (CHILDREN + 1, 7)
        assert_as_one_registry(shown, logged)

        fourth, killed = service.kill(but=third)
        shown = service.wait_until_exact(killed, logged)
        later = shown["answered"] - killed
        assert (shown["left"], shown["g"]["value"]) == (CHILDREN + 1, 7)
        assert sum(shown["own"].values()) == len(logged)
        assert_as_one_registry(shown, logged)
        fifth = service.aggregator(but=fourth)
        service.announce("end")
        assert process.wait(10) == 0
    assert len({first, second, third, fourth, fifth}) == 5
    watched = service.read("watched")
    print(f"{len(logged)} events; exact {soon:.2f} s after the load, {later:.2f} s after the last kill; "
          f"{watched}, alone after {alone - loaded:.2f} s")  # fmt: skip
    assert watched["wrong"] == []
    assert watched["reads"] > 20
    output = service.output()
    assert "Traceback" not in output
    if form == "joined":
        # One start for each kill; a child that exits while it starts one leaves the start to another child.
        assert 4 <= service.starts() <= 6
    else:
        assert output.count("another one is started") == 4
    assert output.count("takes the place of one that ended") in (
        3,
        4,
    )  # the second may die before


def test_a_worker_after_a_crash_without_workers_finds_all_totals(service_of):
    """If the aggregator is killed while no worker runs, the next worker finds all totals."""
    service = service_of("supervise")
    with service.running() as process:
        wait_for(lambda: service.read("loaded"), "the workers have left", 20)
        before = service.events()
        assert len(before) == 400
        pid, _ = service.kill()
        wait_for(lambda: has_ended(pid), "the aggregator has ended")
        since = time.monotonic()
        service.announce("come")
        wait_for(lambda: len(service.events()) == 401, "another worker has come")
        shown = service.wait_until_exact(since)
        print(f"exact {shown['answered'] - since:.2f} s after the next worker came")
        assert shown["left"] == 4
        assert_as_one_registry(shown, service.events(), 2)
        assert service.starts() == 1
        service.announce("end")
        assert process.wait(10) == 0


def test_gunicorns_next_worker_after_a_crash_finds_all_totals(short_dir):
    """If gunicorn's only worker exits and then the aggregator is killed, the next worker has all counts."""
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
def test_a_worker_killed_with_the_aggregator_loses_at_most_two_seconds(service_of, form):
    """A worker killed together with the aggregator loses at most its last 2 s; other workers lose nothing."""
    service = service_of("victims", form, 4)
    with service.running() as process:
        # Longer than the events that may be lost, so that a loss of all of them would be noticed.
        wait_for(
            lambda: (found := service.events("0")) and found[-1].real - found[0].real > LOST_SECONDS + 1,
            "the workers have recorded for a while",
        )
        victim = service.read("pids")[0]
        pid, killed = service.kill(victim)
        others = {n: len(service.events(str(n))) for n in (1, 2, 3)}
        wait_for(lambda: all(len(service.events(str(n))) > others[n] for n in others), "the others go on")
        service.aggregator(but=pid)
        service.announce("stop")
        own = service.events("0")
        sure = sum(event.real < killed - LOST_SECONDS for event in own)
        assert 0 < sure < len(own)

        def settled():
            shown = service.read("shown")
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
        service.announce("end")
        assert process.wait(10) == 0
