"""Reports on a schedule: when they are made, what becomes of those that fail, and how they end."""

from __future__ import annotations

import logging
import sys
import threading
from datetime import timedelta

import pytest

import tapes
from tapes.errors import AggregatorUnavailable, InvalidArgument
from tapes.reporting import Reporter, ScheduledReporter
from tapes.reporting.scheduled import Grid
from tests.processes import MAY_FORK_BESIDE_THREADS, run_python, wait_for

LONG, SHORT = timedelta(hours=1), timedelta(milliseconds=5)


class Noting(ScheduledReporter):
    """A reporter that notes its reports, and runs a function of the test in them."""

    def __init__(self, interval, registry=None, action=lambda: None):
        super().__init__(interval, registry or tapes.Registry())
        self.reports = []
        self.action = action

    def report(self):
        self.reports.append(threading.current_thread())
        self.action()


def count(reporter, name):
    series = reporter.registry.snapshot().get(name, reporter=type(reporter).__name__)
    return series.value if series else 0


def test_the_first_report_comes_at_once_and_the_last_at_the_end():
    """A report is made at the start and one at stop(), by a named daemon thread, whatever the interval."""
    with Noting(LONG) as reporter:
        wait_for(lambda: reporter.reports, "the first report")
        (thread,) = reporter.reports
        assert (thread.daemon, thread.name) == (True, "tapes-Noting")
    assert len(reporter.reports) == 2
    assert not thread.is_alive()


def test_reports_come_every_interval():
    """A report is made every interval until the reporter is stopped."""
    with Noting(SHORT) as reporter:
        wait_for(lambda: len(reporter.reports) > 20, "twenty reports")


@pytest.mark.parametrize(
    ("now", "due", "missed"),
    [(100.0, 110.0, 0), (109.9, 110.0, 0), (110.0, 120.0, 1), (131.0, 140.0, 3), (99.0, 110.0, 0)],
)
def test_a_grid_does_not_drift(now, due, missed):
    """The duration of a report does not move later ones; intervals that pass meanwhile are counted."""
    grid = Grid(10.0, 100.0)
    assert grid.due == 100.0
    assert grid.pass_by(now) == missed
    assert grid.due == due


def test_a_slow_report_has_those_that_it_misses_counted():
    """Reports that a slow one makes impossible are counted, and no two reports run at once."""
    passed = threading.Event()
    with Noting(SHORT, action=lambda: passed.wait(0.1)) as reporter:
        wait_for(lambda: count(reporter, "tapes.reports.skipped") > 10, "reports are skipped")
        passed.set()
    assert len(set(reporter.reports)) == 1


@pytest.mark.parametrize("error", [ValueError("x"), OSError("y"), AggregatorUnavailable("z"), SystemExit(1)])
def test_what_a_report_raises_is_counted_and_logged_once(error, caplog):
    """An exception in a report is counted, logged once, and ends no schedule; a mistake has a traceback."""

    def fail():
        raise error

    with Noting(SHORT, action=fail) as reporter:
        wait_for(lambda: len(reporter.reports) > 5, "it goes on")
    assert count(reporter, "tapes.reports.failed") == len(reporter.reports)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("tapes.reporting", logging.WARNING)
    assert type(error).__name__ in record.getMessage()
    assert bool(record.exc_info) == isinstance(error, (ValueError, SystemExit))


def test_it_is_logged_again_a_minute_later(caplog, monkeypatch):
    """A failure that continues is logged again after a minute, with the number of failures between."""
    now = [1000.0]
    monkeypatch.setattr("tapes.reporting.base.monotonic", lambda: now[0])
    reporter = Noting(LONG)
    for seconds in (0, 30, 29, 2):
        now[0] += seconds
        reporter._failed(OSError("refused"))
    first, second = (record.getMessage() for record in caplog.records)
    assert "OSError: refused" in first
    assert "times" not in first
    assert "2 times" in second


def test_start_twice_is_an_error_and_stop_twice_is_none():
    """A second start() is an error and a second stop() is not; a stopped reporter can be started again."""
    reporter = Noting(LONG)
    reporter.stop()
    with reporter:
        with pytest.raises(InvalidArgument, match="called before"):
            reporter.start()
        wait_for(lambda: reporter.reports, "the first report")
    reporter.stop()
    assert len(reporter.reports) == 2
    with reporter:
        wait_for(lambda: len(reporter.reports) > 2, "it reports again")


def test_a_report_may_stop_its_reporter():
    """A report that calls stop() of its own reporter does not wait for itself."""
    reporter = Noting(SHORT)
    reporter.action = reporter.stop
    reporter.start()
    wait_for(lambda: len(reporter.reports) == 2, "the last report")
    wait_for(lambda: not reporter.reports[0].is_alive(), "the end of the thread")


def test_a_report_that_stops_its_reporter_is_no_report_that_hangs(caplog):
    """A report that stops its own reporter is not logged as hanging."""
    reporter = Noting(SHORT)
    reporter.action = reporter.stop
    reporter.start()
    wait_for(lambda: len(reporter.reports) == 2, "the last report")
    assert caplog.records == []


def test_subclasses_may_call_their_attributes_as_they_like():
    """Subclasses may use any attribute names, because the schedule keeps none in the instance."""

    class Named(Noting):
        count = failed = warn = release = forked = go_on = before_fork = tell = 0

        def report(self):
            super().report()
            self.count += 1
            raise OSError("refused")

    with Named(SHORT) as reporter:
        wait_for(lambda: reporter.count > 5, "it goes on")


def test_the_longest_interval_can_be_used():
    """The longest timedelta, which is longer than a thread can wait, is a valid interval."""
    with Noting(timedelta.max) as reporter:
        wait_for(lambda: reporter.reports, "the first report")
    assert len(reporter.reports) == 2


def test_a_start_that_fails_is_none(monkeypatch):
    """A reporter whose start failed can be started again, and stopped."""
    reporter = Noting(LONG)

    def start(self):
        raise RuntimeError("no thread can be started")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError):
            reporter.start()
    reporter.stop()
    with reporter:
        pass
    assert reporter.reports


def test_stop_leaves_a_report_that_hangs_to_itself(caplog, monkeypatch):
    """stop() does not wait for a report that hangs, and logs that; its late end has no effect."""
    monkeypatch.setattr("tapes.reporting.scheduled.STOP_SECONDS", 0.05)
    hanging = threading.Event()
    reporter = Noting(LONG, action=hanging.wait)
    with reporter:
        wait_for(lambda: reporter.reports, "the first report")
    assert "was not done within" in caplog.text
    with reporter:
        wait_for(lambda: len(reporter.reports) == 2, "a new run")
        hanging.set()
    for thread in reporter.reports:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("interval", [10, 0.5, None, timedelta(0), timedelta(seconds=-1), "10s"])
def test_an_interval_is_a_positive_timedelta(interval):
    """A reporter refuses an interval that is not a positive timedelta."""
    with pytest.raises(InvalidArgument, match="timedelta"):
        Noting(interval)


def test_a_registry_is_a_registry():
    """A reporter refuses a registry of another type; without one it uses the default registry."""
    with pytest.raises(InvalidArgument, match="registry of ScheduledReporter"):
        ScheduledReporter(LONG, "localhost")
    assert ScheduledReporter(LONG).registry is tapes.registry.default_registry


def test_what_is_not_overridden_is_named():
    """A reporter without report() raises an error that names its class."""

    class Mine(Reporter):
        pass

    for method in ("report", "start", "stop"):
        with pytest.raises(NotImplementedError, match=f"Mine has no {method}"):
            getattr(Mine(), method)()


PROGRAM = """
import os, pathlib, sys, time, tapes
from datetime import timedelta
from tapes.reporting import ScheduledReporter

class Printer(ScheduledReporter):
    def report(self):
        os.write(1, f"{os.getpid()} {self.registry.get_stats().c.value}\\n".encode())

def reported(pid):
    while f"{pid} " not in pathlib.Path(sys.argv[1]).read_text():
        time.sleep(0.01)

tapes.counter("c").increment()
printer = Printer(timedelta(milliseconds=20))
printer.start()
"""


def run_program(program, directory):
    """Run ``program`` after the start of a reporter; it writes to the file ``output``."""
    output = directory / "output"
    return run_python(
        f"import os, sys; sys.argv = ['', {str(output)!r}]\n"
        f"os.dup2(os.open({str(output)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)\n" + PROGRAM + program,
        cwd=directory,
    )


def run_printing(program, short_dir):
    """Run ``program`` likewise; return what each process reported, by order."""
    done = run_program(program, short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    reports = [line.split() for line in (short_dir / "output").read_text().splitlines()]
    return {pid: [int(value) for one, value in reports if one == pid] for pid, _ in reports}


def test_the_end_of_the_process_is_the_last_report(short_dir):
    """At the exit of the process a last report is made without a call of stop()."""
    (values,) = run_printing("reported(os.getpid()); tapes.counter('c').increment(41)", short_dir).values()
    assert values[-1] == 42


def test_a_reporter_continues_in_forked_children(short_dir):
    """A reporter continues in forked children; a first start() of the child is accepted, a second is not."""
    program = """
pid = os.fork()
if not pid:
    tapes.counter("c").increment(10)
    reported(os.getpid())
    printer.start()
    try:
        printer.start()
    except tapes.TapesError:
        printer.stop()
        os.write(1, f"{os.getpid()} 99\\n".encode())
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
printer.stop()
"""
    parent, child = sorted(run_printing(program, short_dir).values(), key=max)
    assert set(parent) == {1}
    assert child[-2:] == [11, 99]


def test_children_of_multiprocessing_report_a_last_time(short_dir):
    """Multiprocessing children, which run no atexit functions, make a last report."""
    program = """
import multiprocessing
child = multiprocessing.get_context("fork").Process(target=lambda: tapes.counter("c").increment(10))
child.start()
child.join(20)
assert child.exitcode == 0
"""
    assert 11 in [values[-1] for values in run_printing(program, short_dir).values()]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older ones do not warn")
def test_a_fork_beside_a_reporter_raises_no_warning(short_dir):
    """A fork while a reporter runs gives no warning, because its thread ends before the fork."""
    run_printing("os.fork() or os._exit(0)", short_dir)


@pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="no thread starts in a child forked during a start"
)
def test_threads_that_fork_at_once_leave_one_thread(short_dir):
    """After forks of several threads at once a process has one thread of its reporter."""
    program = """
import threading
def fork():
    for _ in range(40):
        pid = os.fork() or os._exit(0)
        os.waitpid(pid, 0)
threads = [threading.Thread(target=fork) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
def ours():
    return [thread for thread in threading.enumerate() if thread.name == "tapes-Printer"]
assert len(ours()) == 1, ours()
printer.stop()
assert not ours()
"""
    run_printing(MAY_FORK_BESIDE_THREADS + program, short_dir)


def test_a_report_that_hangs_holds_up_no_fork_for_long(short_dir):
    """A hanging report delays a fork for a bounded time; the child has a reporter thread of its own."""
    program = """
import threading
printer.stop()
hanging = threading.Event()
class Hanging(ScheduledReporter):
    def report(self):
        os.write(1, f"{os.getpid()} 5\\n".encode())
        hanging.wait()
reporter = Hanging(timedelta(milliseconds=10))
reporter.start()
pid = os.getpid()
while pathlib.Path(sys.argv[1]).read_text().count(f"{pid} 5") != 1:
    time.sleep(0.01)
for _ in range(3):
    child = os.fork()
    if not child:
        while f"{os.getpid()} 5" not in pathlib.Path(sys.argv[1]).read_text():
            time.sleep(0.01)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
assert len([thread for thread in threading.enumerate() if thread.name == "tapes-Hanging"]) == 1
hanging.set()
while pathlib.Path(sys.argv[1]).read_text().count(f"{pid} 5") < 5:  # it reports on
    time.sleep(0.01)
"""
    assert len(run_printing(MAY_FORK_BESIDE_THREADS + program, short_dir)) == 4


def test_the_end_of_a_process_waits_for_all_reports_at_once(short_dir):
    """At exit all last reports run at once: one that hangs, or an interrupt, prevents no other."""
    program = """
import signal, threading
printer.stop()
class Hanging(ScheduledReporter):
    def report(self):
        threading.Event().wait()
class Good(Printer):
    pass
hung = [Hanging(timedelta(hours=1)) for _ in range(3)]
good = Good(timedelta(hours=1))
for reporter in (*hung, good):
    reporter.start()
reported(os.getpid())
tapes.counter("c").increment(6)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start() if interrupted else None
"""
    for interrupted in (False, True):
        source = f"interrupted = {interrupted}\n" + program
        output = short_dir / str(interrupted)
        output.mkdir()
        done = run_program(source, output)
        assert done.returncode == 0
        assert (output / "output").read_text().splitlines()[-1].endswith(" 7")


def test_forks_wait_for_the_report_under_way(short_dir):
    """A fork waits until a running report has finished, so that a child finds nothing half done."""
    program = """
done = []
class Slow(ScheduledReporter):
    def report(self):
        done.append(os.getpid())
        time.sleep(0.002)
        done.append(os.getpid())
slow = Slow(timedelta(milliseconds=3))
slow.start()
for _ in range(30):
    while not len(done) % 2:
        time.sleep(0.0001)
    pid = os.fork()
    if not pid:
        slow.stop()
        os._exit(done.count(os.getppid()) % 2)
    assert os.waitpid(pid, 0)[1] == 0
"""
    run_printing(program, short_dir)
