"""Reports on the schedule of an IOLoop, which they never hold up."""

from __future__ import annotations

import asyncio
import io
import json
import select
import socket
import threading
import time
from datetime import timedelta

import pytest
from tornado import gen
from tornado.ioloop import IOLoop

import tapes
from tapes.errors import InvalidArgument
from tapes.reporting.tornado import TornadoScheduledReporter
from tapes.reporting.tornado.statsd import TornadoStatsdReporter
from tapes.reporting.tornado.stream import TornadoStreamReporter
from tests.processes import run_python

LONG, SHORT = timedelta(hours=1), timedelta(milliseconds=5)


class Noting(TornadoScheduledReporter):
    """Notes the threads of its reports, and does in them what it is told."""

    def __init__(self, interval, action=lambda: None, **options):
        super().__init__(interval, tapes.Registry(), **options)
        self.reports = []
        self.action = action

    def report(self):
        self.reports.append(threading.current_thread())
        self.action()


class NotingOnTheLoop(Noting):
    async def report(self):
        self.reports.append(threading.current_thread())
        await asyncio.sleep(0)
        self.action()


class NotingByGenerator(Noting):
    @gen.coroutine
    def report(self):
        self.reports.append(threading.current_thread())
        yield gen.moment
        self.action()


ALL = pytest.mark.parametrize("kind", [Noting, NotingOnTheLoop, NotingByGenerator])


def count(reporter, name):
    series = reporter.registry.snapshot().get(name, reporter=type(reporter).__name__)
    return series.value if series else 0


async def until(condition):
    """Give way until ``condition`` holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@ALL
def test_reports_come_at_once_every_interval_and_at_the_end(kind):
    """Beside the loop, or on it if the report gives way by itself."""

    async def main():
        with kind(LONG) as one, kind(SHORT) as many:
            assert one.reports == []  # not before the loop has its turn
            await until(lambda: one.reports and len(many.reports) > 20)
            assert len(one.reports) == 1
        await until(lambda: len(one.reports) == 2)
        return one.reports

    for thread in asyncio.run(main()):
        assert (thread is threading.main_thread()) == (kind is not Noting)
        assert thread is threading.main_thread() or (thread.daemon, thread.name) == (True, "tapes-Noting")


def test_a_slow_report_holds_up_nothing():
    """The loop goes on; what falls due meanwhile is skipped and counted, and never two run at once."""
    passed = threading.Event()

    async def main():
        with Noting(SHORT, passed.wait) as reporter:
            await until(lambda: count(reporter, "tapes.reports.skipped") > 20)
            assert len(reporter.reports) == 1
            passed.set()
            await until(lambda: len(reporter.reports) > 3)
        return reporter

    asyncio.run(main())


def test_a_slow_coroutine_is_not_run_twice_at_once():
    """Likewise."""

    async def main():
        waiting = asyncio.Event()

        class Slow(Noting):
            async def report(self):
                self.reports.append(1)
                await waiting.wait()

        with Slow(SHORT) as reporter:
            await until(lambda: count(reporter, "tapes.reports.skipped") > 20)
            assert len(reporter.reports) == 1
            waiting.set()
            await until(lambda: len(reporter.reports) > 3)

    asyncio.run(main())


@ALL
def test_what_a_report_raises_does_not_end_the_schedule(kind, caplog):
    """It is counted, and logged once."""

    def fail():
        raise ValueError("x")

    async def main():
        with kind(SHORT, fail) as reporter:
            await until(lambda: len(reporter.reports) > 5)
        await until(lambda: count(reporter, "tapes.reports.failed") == len(reporter.reports))

    asyncio.run(main())
    assert [record.name for record in caplog.records] == ["tapes.reporting"]


@ALL
def test_a_loop_that_is_over_does_not_keep_the_last_report_from_being_made(kind):
    """The seed's way: start, run the loop, stop."""
    asyncio.set_event_loop(asyncio.new_event_loop())
    loop = IOLoop.current()
    reporter = kind(LONG, io_loop=loop)
    reporter.start()
    loop.add_callback(lambda: loop.add_callback(loop.stop))
    loop.start()
    reporter.stop()
    assert len(reporter.reports) == 2
    loop.close(all_fds=True)
    asyncio.set_event_loop(None)


def test_a_thread_that_can_not_be_started_is_a_report_that_failed(monkeypatch):
    """The schedule goes on, and the last report is made."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    async def main():
        with Noting(SHORT) as reporter, monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            await until(lambda: count(reporter, "tapes.reports.failed") > 2)
            patched.undo()
            await until(lambda: len(reporter.reports) > 2)

    asyncio.run(main())


def test_nothing_is_left_of_a_reporter_that_was_stopped():
    """Nothing waits for the end of the process, and sockets are closed."""
    from tapes import shutdown

    before = set(shutdown._actions)

    async def main():
        for _ in range(5):
            with TornadoStatsdReporter(LONG, "127.0.0.1", 9, registry=tapes.Registry()) as reporter:
                reporter.registry.gauge("g").set(1)
                await until(lambda r=reporter: r.client._transport._opened)
            await until(lambda r=reporter: r.client._transport._socket is None)
        await until(lambda: set(shutdown._actions) == before)

    asyncio.run(main())


def test_a_loop_that_is_closed_makes_no_last_report(caplog):
    """It is said in one line."""

    async def main():
        reporter = NotingOnTheLoop(LONG)
        reporter.start()
        await until(lambda: reporter.reports)
        return reporter

    asyncio.run(main()).stop()
    (record,) = caplog.records
    assert not record.exc_info
    assert "the loop is closed" in caplog.text


def test_start_twice_is_an_error_and_stop_twice_is_none():
    """It can be started again after it was stopped."""

    async def main():
        with Noting(LONG) as reporter, pytest.raises(InvalidArgument, match="called before"):
            reporter.start()
        reporter.stop()
        with reporter:
            await until(lambda: len(reporter.reports) > 1)

    asyncio.run(main())


@pytest.mark.parametrize("interval", [10, None, timedelta(0)])
def test_an_interval_is_a_positive_timedelta(interval):
    """The error says so."""
    with pytest.raises(InvalidArgument, match="timedelta"):
        TornadoScheduledReporter(interval)


def test_lines_of_json():
    """One for each report."""
    stream, registry = io.StringIO(), tapes.Registry()
    registry.counter("c").increment(3)

    async def main():
        with TornadoStreamReporter(LONG, stream, registry):
            await until(lambda: stream.getvalue().count("\n") == 1)
            registry.counter("c").increment()
        await until(lambda: stream.getvalue().count("\n") == 2)

    asyncio.run(main())
    assert [json.loads(line)["c"]["value"] for line in stream.getvalue().splitlines()] == [3, 4]


def test_statsd():
    """The same packets as from a thread."""
    registry = tapes.Registry()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)

        async def main():
            registry.counter("c").increment(3)
            port = receiver.getsockname()[1]
            with TornadoStatsdReporter(LONG, "127.0.0.1", port, "p", registry):
                await until(lambda: select.select([receiver], [], [], 0)[0])
                registry.counter("c").increment(4)

        asyncio.run(main())
        assert [receiver.recv(999), receiver.recv(999)] == [b"p.c:3|c", b"p.c:4|c"]


def test_the_end_of_the_process_waits_for_the_last_report(short_dir):
    """Which is made beside the loop; one that hangs keeps nothing from ending."""
    program = """
import asyncio, datetime, tapes, time
from tapes.reporting.tornado.stream import TornadoStreamReporter

class Slow(TornadoStreamReporter):
    def report(self):
        time.sleep(0.3)
        super().report()

async def main():
    reporter = Slow(datetime.timedelta(hours=1))
    tapes.counter("c").increment()
    reporter.start()
    await asyncio.sleep(0.01)
    tapes.counter("c").increment()
    reporter.stop()

asyncio.run(main())
"""
    done = run_python(program, cwd=short_dir)
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["c"]["value"] == 2


def test_a_forked_child_is_not_started(short_dir):
    """It has no use for the loop of its parent, and can start on one of its own."""
    program = """
import asyncio, datetime, os, tapes
from tapes.reporting.tornado.stream import TornadoStreamReporter

async def main():
    reporter.start()
    await asyncio.sleep(0.05)

def child():
    reporter.stop()
    reporter.start()
    reporter.stop()
    os._exit(0)

async def parent():
    await main()
    return os.fork() or child()

reporter = TornadoStreamReporter(datetime.timedelta(hours=1))
pid = os.fork() or (asyncio.run(main()), os._exit(0))
assert os.waitpid(pid, 0)[1] == 0
assert os.waitpid(asyncio.run(parent()), 0)[1] == 0
"""
    done = run_python(program, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
