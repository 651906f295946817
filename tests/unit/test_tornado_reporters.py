"""Reporters on the schedule of an IOLoop, which they never block."""

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
    """A reporter that notes the threads of its reports, and runs a function of the test in them."""

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
    """A first report is made at once, then one every interval, and one at the end; none blocks the loop."""

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


def test_a_slow_report_does_not_block_the_loop():
    """During a slow report the loop runs, due reports are skipped and counted, and no two run at once."""
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
    """A report that is a slow coroutine never runs twice at once; skipped reports are counted."""

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
    """An exception in a report is counted, logged once, and does not end the schedule."""

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
    """The last report is made by stop(), also when the loop has already ended."""
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
    """If no thread can be started for a report, it counts as failed, and the schedule goes on."""

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
    """A stopped reporter leaves no exit hook and no open socket."""
    from tapes import shutdown

    before = set(shutdown._actions)

    async def main():
        for _ in range(5):
            with TornadoStatsdReporter(LONG, "127.0.0.1", 9, registry=tapes.Registry()) as reporter:
                reporter.registry.gauge("g").set(1)
                await until(lambda r=reporter: r.client._transport._opened)
            await until(lambda r=reporter: r.client._transport._socket is None)
        await until(lambda: set(shutdown._actions) <= before)

    asyncio.run(main())


def test_a_loop_that_is_closed_makes_no_last_report(caplog):
    """If the loop is closed before stop(), a coroutine's last report is not made, which is logged."""

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
    """A second start() is an error and a second stop() is not; a stopped reporter can be started again."""

    async def main():
        with Noting(LONG) as reporter, pytest.raises(InvalidArgument, match="called before"):
            reporter.start()
        reporter.stop()
        with reporter:
            await until(lambda: len(reporter.reports) > 1)

    asyncio.run(main())


@pytest.mark.parametrize("interval", [10, None, timedelta(0)])
def test_an_interval_is_a_positive_timedelta(interval):
    """A reporter refuses an interval that is not a positive timedelta."""
    with pytest.raises(InvalidArgument, match="timedelta"):
        TornadoScheduledReporter(interval)


def test_lines_of_json():
    """TornadoStreamReporter writes one line of JSON per report."""
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
    """TornadoStatsdReporter sends the same packets as the reporter with a thread."""
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
    """The exit of the process waits for a last report that runs in a thread."""
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
    """A forked child's reporter is not started, and can be started on a loop of the child."""
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
