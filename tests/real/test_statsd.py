"""A real statsd, and a real Graphite behind it, show exactly what was recorded."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from datetime import timedelta
from functools import partial

import pytest

from tapes.reporting.statsd import StatsdReporter
from tests.processes import running, wait_for
from tests.real.statsd import LOOPBACK, Carbon, Statsd

pytestmark = pytest.mark.needs("node")

DURATIONS = {"min", "max", "mean", "stddev", "q50", "q75", "q95", "q98", "q99", "q999"}
HOUR = timedelta(hours=1)
BALANCES = (3, -5, -4, 0, -0.25, 1e9, -1e9, 7, -7, 1e-7, -1e-7, 0.1 + 0.2)


@pytest.fixture
def statsd(short_dir):
    """A statsd that keeps its counters; it has refused no line at the end of the test."""
    with Statsd(short_dir) as daemon:
        yield daemon
        assert daemon.bad_lines() == 0


@contextlib.contextmanager
def reporting(statsd, registry, interval=HOUR, protocol="udp", host=LOOPBACK, **options):
    """Make a reporter that reports when `report` is called; stop it at the end of the block."""
    port = statsd.port if protocol == "udp" else statsd.tcp_port
    reporter = StatsdReporter(interval, host, port, registry=registry, protocol=protocol, **options)
    try:
        yield reporter
    finally:
        reporter.stop()


@pytest.fixture(params=["udp", "tcp"])
def reporter(request, statsd, registry):
    with reporting(statsd, registry, protocol=request.param) as reporter:
        yield reporter


def to_be_shown(registry):
    """Return the counters and gauges that statsd has to show for the contents of a registry."""
    counters, gauges = {}, {}
    for family in registry.snapshot():
        for series in family.series:
            name = ".".join((family.name, *(text for label in series.labels for text in label)))
            fields = series.fields()
            if family.kind == "counter":
                counters[name] = fields["value"]
            elif family.kind == "gauge":
                gauges[name] = fields["value"]
            else:
                counters[f"{name}.count"] = fields.pop("count")
                fields.pop("sum", None)
                in_ms = DURATIONS if family.kind == "timer" else ()
                gauges.update({f"{name}.{f}": v * 1000 if f in in_ms else v for f, v in fields.items()})
    return {name: value for name, value in counters.items() if value}, gauges


def assert_shown(statsd, counters, gauges):
    """Assert that statsd shows exactly these counters and gauges."""
    gauges = pytest.approx(gauges, rel=1e-9)
    statsd.settle()
    with contextlib.suppress(AssertionError):
        wait_for(lambda: (statsd.totals(), statsd.gauges()) == (counters, gauges), "it is shown", 10)
    assert statsd.totals() == counters
    assert statsd.gauges() == gauges


def record(registry, turn, *label_sets):
    """Record into every kind of metric, other values in every turn."""
    for labels in label_sets or ({}, {"queue": "mail"}, {"queue": "sms", "region": "eu"}):
        registry.counter("jobs.waiting", **labels).increment(2 * turn + 1)
        registry.counter("jobs.waiting", **labels).decrement(3 * (turn % 4))
        registry.meter("jobs.done", **labels).mark(turn % 3)
        registry.gauge("balance", **labels).set(BALANCES[turn % len(BALANCES)])
        for value in range(turn):
            registry.histogram("mail.size", **labels).update(value * 37 % 1000 - 100)
            registry.timer("mail.render", **labels).update(value * 0.0123)


def test_statsd_itself_shows_what_it_is_sent(statsd):
    """statsd adds up values of several packets, keeps odd names, and takes a sign on a gauge as a change.

    The other tests rely on this.
    """
    statsd.send("jobs:3|c", "jobs:-1|c", "render:20|ms", "render:0.5|ms", "up:5|g", "up:-2|g")
    statsd.send("it's:1|g", "`'\":1|g", "down:0|g", "down:-5|g")
    statsd.send("large:1e22|c", "small:1e-7|c", "tagged:1|c|#queue:mail,b:c")
    statsd.settle()
    assert statsd.counters() == {"jobs": 2, "large": 1e22, "small": 1e-7, "tagged;queue=mail;b=c": 1}
    assert statsd.gauges() == {"up": 3, "it's": 1, "`'\"": 1, "down": -5}
    assert statsd.timers() == {"render": [20, 0.5]}
    assert statsd.packets() == 4


def test_twenty_reports_with_a_restart_between_show_what_was_recorded(statsd, registry, reporter, clock):
    """After each of twenty reports, with a restart of statsd between, counts and gauges are exact."""
    for turn in range(20):
        if turn == 10:
            statsd.restart()
        record(registry, turn)
        clock.advance(5)
        reporter.report()
        assert_shown(statsd, *to_be_shown(registry))
    assert registry.get_stats().jobs.waiting.value == 400 - 5 * (3 + 6 + 9)


def test_a_report_of_nothing_new_adds_nothing(statsd, registry, reporter):
    """Three reports without a new event between them count each event once."""
    record(registry, 5)
    for _ in range(3):
        reporter.report()
        assert_shown(statsd, *to_be_shown(registry))


def test_events_from_while_statsd_was_down_are_in_the_next_report(statsd, registry, reporter):
    """Events whose report failed while statsd was down are in the next report; failures are counted."""
    record(registry, 3)
    reporter.report()
    assert_shown(statsd, *to_be_shown(registry))
    with statsd.down():
        for turn in range(3):
            record(registry, turn)
            with pytest.raises(ConnectionRefusedError):
                reporter.report()
    reporter.report()
    assert_shown(statsd, *to_be_shown(registry))
    assert statsd.totals()["tapes.statsd.failed.reporter.StatsdReporter"] >= 3


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_reporters_one_after_another_report_each_event_once(statsd, registry, protocol):
    """A later reporter of a registry reports only the events that earlier ones have not reported."""
    for turn in range(3):
        record(registry, turn)
        with reporting(statsd, registry, protocol=protocol) as reporter:
            reporter.report()
        assert_shown(statsd, *to_be_shown(registry))


def test_a_gauge_is_set_whatever_its_sign_was(statsd, registry, reporter):
    """A gauge is set to its value, though statsd takes a leading sign as a change."""
    gauge = registry.gauge("balance")
    for value in (*BALANCES, -0.0, *BALANCES[::-1]):
        gauge.set(value)
        reporter.report()
        assert_shown(statsd, {}, {"balance": value})


def count_a_thousand(registry):
    expected = {}
    for number in range(1000):
        registry.counter("requests.finished", route=f"route_{number}").increment(number + 1)
        expected[f"requests.finished.route.route_{number}"] = number + 1
    return expected


def test_a_thousand_series_arrive(statsd, registry, reporter):
    """A report of a thousand series arrives complete, in several packets."""
    expected = count_a_thousand(registry)
    reporter.report()
    assert_shown(statsd, expected, {})


def test_datagrams_are_full_and_fit_into_a_frame(statsd, registry):
    """Datagrams fit into an Ethernet frame, and there are hardly more of them than necessary."""
    size = sum(len(f"{name}:{value}|c\n") for name, value in count_a_thousand(registry).items())
    with reporting(statsd, registry) as reporter:
        reporter.report()
    statsd.settle()
    assert size / 1472 < statsd.packets() - 1 < size / 1350


def test_localhost_is_where_statsd_listens(statsd, registry):
    """The host name ``localhost`` works, although it may also stand for an IPv6 address."""
    registry.counter("jobs").increment(3)
    with reporting(statsd, registry, host="localhost") as reporter:
        reporter.report()
        assert_shown(statsd, {"jobs": 3}, {})


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_a_schedule_misses_nothing_and_doubles_nothing(statsd, registry, protocol):
    """Scheduled reports and the one of stop() count each event of several threads exactly once."""
    counter, timer = registry.counter("jobs"), registry.timer("render")

    def work():
        for _ in range(20000):
            counter.increment()
            timer.update(0.002)

    threads = [threading.Thread(target=work) for _ in range(3)]
    counter.increment(7)
    with reporting(statsd, registry, timedelta(milliseconds=20), protocol) as reporter:
        reporter.start()
        wait_for(lambda: statsd.totals().get("jobs") == 7, "the first report is made at once")
        for thread in threads:
            thread.start()
        wait_for(lambda: statsd.totals()["jobs"] > 7, "a report is made on schedule")
        for thread in threads:
            thread.join()
        counter.increment(5)
    assert_shown(statsd, *to_be_shown(registry))
    assert ours(statsd.totals()) == {"jobs": 60012, "render.count": 60000}


HOSTILE = (
    "a:1|c",
    "a b",
    "50%|@1",
    "#tag",
    "semi;colon,comma",
    "slash/back\\slash",
    "größe",
    "日本",
    "'q\"",
    "*?[]{}()",
)
LINES = ("|@0.1", "two\nlines:1|c", "tab\tcr\r\0", "", ".", "a.b..c", "127.0.0.1:80", "\ud800")


def folded(text):
    return re.sub(r"[^A-Za-z0-9_-]", "_", text) or "_"


@pytest.mark.parametrize("sanitize", [False, True], ids=["as sent", "as usual"])
def test_hostile_names_and_labels_arrive_as_segments(short_dir, registry, sanitize):
    """Characters in names and labels that statsd or Graphite would interpret arrive replaced."""
    expected = {}
    for number, text in enumerate(HOSTILE):
        registry.counter(f"{text}.n{number}").increment(number + 1)
        expected[f"{folded(text)}.n{number}"] = number + 1
    for number, text in enumerate(HOSTILE + LINES):
        registry.counter(f"jobs.n{number}", queue=text, region="eu").increment(number + 1)
        expected[f"jobs.n{number}.queue.{folded(text)}.region.eu"] = number + 1
    with Statsd(short_dir, keyNameSanitize=sanitize) as statsd, reporting(statsd, registry) as reporter:
        reporter.report()
        assert_shown(statsd, expected, {})
        assert statsd.bad_lines() == 0


def test_labels_arrive_as_tags(statsd, registry):
    """With ``tags=True`` labels arrive as tags, hostile values included."""
    expected = {}
    for number, text in enumerate(HOSTILE + LINES):
        registry.counter(f"jobs.n{number}", queue=text, region="eu").increment(number + 1)
        tag = re.sub(r"[^!-~]|[,;|#]", "_", text)
        expected[f"jobs.n{number};queue={tag or '_'};region=eu"] = number + 1
    registry.gauge("balance", queue="mail").set(-2.5)
    registry.meter("jobs.done").mark(3)
    with reporting(statsd, registry, tags=True) as reporter:
        reporter.report()
    rates = {f"jobs.done.{rate}": 0 for rate in ("m1", "m5", "m15")}
    assert_shown(statsd, {**expected, "jobs.done.count": 3}, {"balance;queue=mail": -2.5, **rates})


def test_a_prefix_comes_before_every_name(statsd, registry):
    """A prefix is before every name that a report contains."""
    record(registry, 3)
    with reporting(statsd, registry, prefix="shop.web") as reporter:
        reporter.report()
    shown = ({f"shop.web.{name}": value for name, value in part.items()} for part in to_be_shown(registry))
    assert_shown(statsd, *shown)


SERVICE = """
import os, sys
from datetime import timedelta
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.reporting.statsd import StatsdReporter

address = "ipc://service.ipc"
registry = DistributedRegistry(address)
jobs = registry.counter("jobs", queue="mail")
render, balance = registry.timer("render"), registry.gauge("balance")
jobs.increment(7)
reporter = StatsdReporter(timedelta(milliseconds=50), "127.0.0.1", int(sys.argv[1]))
aggregator = RegistryAggregator([reporter], address)
aggregator.start()
receiver, sender = os.pipe()


def work():
    balance.set(-1.5)
    for _ in range(1000):
        jobs.increment(3)
        jobs.decrement()
        render.update(0.004)


def worker(leaves_early):
    pid = os.fork()
    if pid:
        return pid
    os.close(sender)
    registry.connect()
    work()
    if not leaves_early:
        os.read(receiver, 1)  # until no process has the sender
        work()
    registry.close()
    os._exit(0)


workers = [worker(leaves_early=number == 0) for number in range(4)]
assert os.waitpid(workers.pop(0), 0)[1] == 0
with open("go_on") as go_on:
    go_on.read()
os.close(sender)
for pid in workers:
    assert os.waitpid(pid, 0)[1] == 0
aggregator.stop()
"""


def test_a_service_of_four_processes_is_reported_once(statsd, short_dir):
    """An aggregator reports each event of four processes once, whenever they exit, and of before the fork."""
    (short_dir / "service").mkdir()
    os.mkfifo(short_dir / "service" / "go_on")
    command = [sys.executable, "-W", "error", "-c", SERVICE, str(statsd.port)]
    with running(command, cwd=short_dir / "service") as service:
        early = {"jobs.queue.mail": 8007, "render.count": 4000}
        wait_for(lambda: ours(statsd.totals()) == early, "the first half of their work is reported", 30)
        wait_for(lambda: statsd.gauges().get("balance") == -4.5, "the gauge of the exited worker is removed")
        flags = os.O_WRONLY | os.O_NONBLOCK
        os.close(wait_for(lambda: os.open(short_dir / "service" / "go_on", flags), "it listens"))
        assert service.wait(30) == 0
    statsd.settle()
    assert ours(statsd.totals()) == {"jobs.queue.mail": 14007, "render.count": 7000}
    assert statsd.gauges()["render.max"] == pytest.approx(4, rel=0.004)


WORKERS = """
import os, sys
from datetime import timedelta
import tapes
from tapes.reporting.statsd import StatsdReporter

jobs, render = tapes.counter("jobs", queue="mail"), tapes.timer("render")
jobs.increment(7)
with StatsdReporter(timedelta(milliseconds=50), "127.0.0.1", int(sys.argv[1])):
    for number in range(4):
        if os.fork() == 0:
            for _ in range(1000 * number):
                jobs.increment()
                render.update(0.004)
            sys.exit()
    jobs.increment(5)
    for _ in range(4):
        assert os.wait()[1] == 0
"""


def test_workers_with_their_own_reporters_add_up(statsd, short_dir):
    """If each process of a service reports on its own, statsd's counts add up to the total."""
    with running([sys.executable, "-W", "error", "-c", WORKERS, str(statsd.port)], cwd=short_dir) as service:
        assert service.wait(30) == 0
    statsd.settle()
    assert ours(statsd.totals()) == {"jobs.queue.mail": 6012, "render.count": 6000}


def ours(shown):
    """Return the metrics without those of tapes itself."""
    return {name: value for name, value in shown.items() if not name.startswith("tapes.")}


@pytest.mark.needs("carbon-cache", "whisper-fetch")
def test_graphite_shows_what_was_recorded(short_dir, registry, clock):
    """Graphite's points add up to the exact counts, with a restart of statsd between two flushes."""
    with contextlib.ExitStack() as stack:
        carbon = stack.enter_context(Carbon(short_dir))
        statsd = stack.enter_context(Statsd(short_dir, graphite_port=carbon.port))
        reporter = stack.enter_context(reporting(statsd, registry))
        for turn in range(20):
            record(registry, turn, {"queue": "mail"})
            clock.advance(5)
            reporter.report()
            counters, gauges = to_be_shown(registry)
            if turn % 5 == 4:
                assert_stored(carbon, counters)
            if turn == 9:
                statsd.stop()
                statsd.start()
        for name, value in gauges.items():
            wait_for(partial(is_last, carbon, name, value), f"{name} is {value} at last", every=0.1)


def assert_stored(carbon, counters):
    """Wait until the flushed values add up to the counters, and a flush has nothing to add."""
    for name, value in counters.items():
        wait_for(partial(is_stored, carbon, name, value), f"{value} of {name} are stored", every=0.1)


def is_stored(carbon, name, value):
    values = [value for _, value in carbon.points(f"stats.counters.{name}.count")]
    return values[-1:] == [0] and sum(values) == value


def is_last(carbon, name, value):
    values = [value for _, value in carbon.points(f"stats.gauges.{name}")]
    return values[-1:] == pytest.approx([value], rel=1e-9)
