"""Reports on demand: by the schedule's own thread, when the last worker leaves, within a bounded time."""

from __future__ import annotations

import errno
import os
import threading
from datetime import timedelta

import pytest

import tapes
from tapes import forks
from tapes.distributed.aggregator.reporters import Reports
from tapes.distributed.protocol.messages import Flush, Reply
from tapes.distributed.protocol.wire import decode, encode
from tapes.errors import AddressInUse
from tapes.reporting import Reporter, ScheduledReporter
from tapes.reporting.http import HTTPReporter
from tests.processes import free_port, get, wait_for
from tests.unit.handlers import DEAD_PROCESS, Worker

LONG, SHORT = timedelta(hours=1), timedelta(milliseconds=20)


class Noting(ScheduledReporter):
    """Notes which thread reports, and how many reports are under way at once."""

    def __init__(self, interval=LONG, action=lambda: None):
        super().__init__(interval, tapes.Registry())
        self.reports = []
        self.action = action
        self.at_once = self.most_at_once = 0

    def report(self):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.reports.append(threading.current_thread())
        self.action()
        self.at_once -= 1


def demanded(reporter) -> threading.Event:
    done = threading.Event()
    reporter._report_now(done.set)
    return done


def test_a_demanded_report_is_made_by_the_schedules_own_thread():
    """Long before it is due; its end is noted after it, and the last report still comes."""
    with Noting() as reporter:
        wait_for(lambda: len(reporter.reports) == 1, "the first report")
        for number in (2, 3):
            assert demanded(reporter).wait(10)
            assert len(reporter.reports) == number
    assert len(reporter.reports) == 4
    assert len(set(reporter.reports)) == 1


def test_a_demand_during_a_report_is_met_by_the_next_one():
    """What is under way may have read its values before; there are never two at once."""
    goes_on = threading.Event()
    with Noting(action=lambda: goes_on.wait(10)) as reporter:
        wait_for(lambda: reporter.at_once, "a report is under way")
        demands = [demanded(reporter) for _ in range(3)]
        assert not any(demand.is_set() for demand in demands)
        goes_on.set()
        assert all(demand.wait(10) for demand in demands)
        assert len(reporter.reports) == 2
    assert reporter.most_at_once == 1


def test_the_schedule_goes_on_beside_demanded_reports():
    """None of its moments is counted as skipped, and none is missing."""
    with Noting(SHORT) as reporter:
        for _ in range(20):
            assert demanded(reporter).wait(10)
        reached = len(reporter.reports)
        wait_for(lambda: len(reporter.reports) > reached + 5, "the schedule goes on")
        assert reporter.registry.snapshot().get("tapes.reports.skipped", reporter="Noting") is None
    assert reporter.most_at_once == 1


def test_a_demand_of_what_does_not_report_is_met_at_once():
    """A reporter that was not started, one that was stopped, and one without a schedule."""
    reporter = Noting()
    assert demanded(reporter).is_set()
    with reporter:
        pass
    reports = len(reporter.reports)
    assert demanded(reporter).is_set()
    assert demanded(HTTPReporter(free_port())).is_set()
    assert len(reporter.reports) == reports


def test_a_report_that_fails_meets_its_demand():
    """A requested report that fails is counted as failed, and answers the request."""

    def fail():
        raise OSError("unreachable")

    with Noting(action=fail) as reporter:
        assert demanded(reporter).wait(10)
        failed = reporter.registry.snapshot().get("tapes.reports.failed", reporter="Noting")
        assert failed.value == len(reporter.reports)


def test_a_demand_outlives_a_fork():
    """The parent's next thread answers the request; the child has none, and keeps its own schedule."""
    goes_on = threading.Event()
    with Noting(action=lambda: goes_on.wait(10)) as reporter:
        wait_for(lambda: reporter.at_once, "a report is under way")
        demand = demanded(reporter)
        pid = os.fork()
        if not pid:
            os._exit(len(reporter._run._requests))
        goes_on.set()
        assert demand.wait(10)
        assert os.waitpid(pid, 0)[1] == 0
        demand = demanded(reporter)
        pid = os.fork()
        if not pid:
            os._exit(0)
        assert demand.wait(10)
        assert os.waitpid(pid, 0)[1] == 0


def is_due(books_):
    """Take back whether reports are due, as the aggregator does."""
    due, books_.reports_due = books_.reports_due, False
    return due


def test_reports_are_due_when_the_last_worker_says_goodbye(make_handler):
    """Reports are due when the last live worker exits; workers known by their children only do not count."""
    one, two = Worker(), Worker()
    made = make_handler()
    made.publication(one.publication())
    made.publication(two.publication())
    ancestor = Worker().update()._replace(process=forks.this_process())
    made.publication(encode(two.update()._replace(ancestors=(ancestor,))))
    made.reap_workers(0.0)
    assert not is_due(made)
    made.answer(one.goodbye())
    assert not is_due(made)
    made.answer(two.goodbye())
    assert is_due(made)
    made.reap_workers(1.0)
    assert not is_due(made)


def test_reports_are_due_when_the_last_worker_is_found_dead(make_handler):
    """Once; and again if a publication of it arrives later."""
    dead = Worker(process=DEAD_PROCESS)
    made = make_handler()
    made.publication(dead.publication())
    made.reap_workers(0.0)
    assert is_due(made)
    made.reap_workers(0.1)
    assert not is_due(made)
    made.publication(dead.publication())
    made.reap_workers(0.2)
    assert is_due(made)


def test_a_goodbye_beside_the_dead_is_the_last(make_handler):
    """An exit beside dead workers is the last one, also if their death has not been noticed yet."""
    dead, one = Worker(process=DEAD_PROCESS), Worker()
    made = make_handler()
    made.publication(dead.publication())
    made.publication(one.publication())
    made.answer(one.goodbye())
    assert is_due(made)


def test_reports_are_due_when_they_are_asked_for(make_handler):
    """Reports are due when they are requested, whatever workers live."""
    made, worker = make_handler(), Worker()
    made.publication(worker.publication())
    assert decode(made.answer(encode(Flush(3)))) == Reply(3, "ok", b"")
    assert is_due(made)


def reports(*reporters, now=0.0):
    made = Reports(lambda: None)
    return made, made.begin(list(reporters), tapes.Registry(), now)


def test_a_demand_is_over_when_all_have_reported_or_time_is_up():
    """A reporter that hangs does not hold up the others, nor the demand for more than half a second."""
    goes_on = threading.Event()
    hanging, other = Noting(action=lambda: goes_on.wait(10)), Noting()
    made, have_started = reports(hanging, other)
    try:
        assert have_started
        demand = made.demand(100.0)
        wait_for(lambda: len(other.reports) >= 2, "the other one reports")
        assert not made.is_met(demand, 100.49)
        assert made.is_met(demand, 100.5)
        goes_on.set()
        wait_for(lambda: made.is_met(demand, 100.0), "both have reported")
    finally:
        goes_on.set()
        made.stop()


def test_a_demand_before_the_start_is_made_after_it():
    """An aggregator that recovers starts its reporters later; the demand is met by then, or time is up."""
    made, reporter = Reports(lambda: None), Noting()
    demand = made.demand(100.0)
    assert not made.is_met(demand, 100.1)
    made.begin([reporter], tapes.Registry(), 100.2)
    wait_for(lambda: made.is_met(demand, 100.2), "it has reported")
    made.stop()


class Binding(Reporter):
    """Needs what another process has until it is ``free``."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.free = False
        self.calls = []

    def start(self):
        self.calls.append("start")
        if not self.free:
            raise self.error

    def pause(self):
        self.calls.append("pause")

    def resume(self):
        self.calls.append("resume")
        if not self.free:
            raise self.error

    def stop(self):
        self.calls.append("stop")


@pytest.mark.parametrize("error", [AddressInUse("taken"), OSError(errno.EADDRINUSE, "taken")])
def test_what_is_in_use_is_tried_for_four_seconds(error):
    """Others start at once. After that the error is the aggregator's."""
    binding, other = Binding(error), Noting()
    made, have_started = reports(binding, other)
    try:
        assert not have_started
        wait_for(lambda: other.reports, "the other one reports")
        assert not made.have_started(3.9)
        with pytest.raises(type(error), match="taken"):
            made.have_started(4.0)
        binding.free = True
        assert made.have_started(4.1)
    finally:
        made.stop()
    assert binding.calls == ["start"] * 4 + ["stop"]


def test_another_error_ends_the_attempt_at_once():
    """An error that is a mistake ends the attempt at once, without waiting."""
    with pytest.raises(ValueError, match="mistaken"):
        reports(Binding(ValueError("mistaken")))


def test_reporters_pause_once_and_resume_when_they_can(caplog):
    """A pause is not repeated; a failed resume is tried again, and logged once."""
    binding = Binding(AddressInUse("taken"))
    binding.free = True
    made, _ = reports(binding)
    made.resume()
    made.pause()
    made.pause()
    binding.free = False
    made.resume()
    made.resume()
    binding.free = True
    made.resume()
    made.resume()
    assert binding.calls == ["start", "pause", "resume", "resume", "resume"]
    assert [record.getMessage() for record in caplog.records] == [
        "tapes: Binding: it can't resume yet (taken)"
    ]


def test_an_http_reporter_that_pauses_gives_back_its_port():
    """Another one can listen there; when that has stopped, it resumes on the same port."""
    registry = tapes.Registry()
    reporter = HTTPReporter(0, registry)
    with reporter:
        port = reporter.port
        reporter.pause()
        with HTTPReporter(port, registry):
            assert get(port, "/")[0] == 200
            with pytest.raises(AddressInUse):
                reporter.resume()
        reporter.resume()
        assert reporter.port == port
        assert get(port, "/")[0] == 200
