"""StatsD: what is sent, in which packets, and that no count is reported twice, missing or negative."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pathlib
import socket
import threading
from datetime import timedelta

import pytest

import tapes
from tapes.distributed.registry import DistributedRegistry
from tapes.errors import AggregatorUnavailable, InvalidArgument
from tapes.reporting.statsd import StatsdReporter
from tests.processes import free_port, wait_for
from tests.receivers import Receiver

LONG = timedelta(hours=1)


@pytest.fixture
def receiver():
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


def reporter_to(receiver, registry, **options):
    return StatsdReporter(LONG, "127.0.0.1", receiver.port, registry=registry, **options)


def test_each_kind_is_sent_in_its_form(receiver, registry):
    """Counts are sent as differences, everything else as its value; times in milliseconds."""
    registry.counter("c").increment(3)
    registry.meter("m").mark(2)
    registry.gauge("g").set(1.5)
    registry.histogram("h").update(200)
    registry.timer("t").update(0.25)
    reporter_to(receiver, registry).report()
    fields = ("min", "max", "mean", "q50", "q75", "q95", "q98", "q99", "q999")
    assert sorted(receiver.lines()) == sorted([
        "c:3|c", "m.count:2|c", "h.count:1|c", "t.count:1|c", "g:1.5|g",
        *(f"{name}.{rate}:0.0|g" for name in "mt" for rate in ("m1", "m5", "m15")),
        *(f"h.{field}:200.0|g" for field in fields), "h.stddev:0.0|g",
        *(f"t.{field}:250.0|g" for field in fields), "t.stddev:0.0|g",
    ])  # fmt: skip


def test_counts_are_differences_since_the_last_report(receiver, registry):
    """A report contains the difference of each count that has changed, negative ones included."""
    counter, meter = registry.counter("c"), registry.meter("m")
    reporter = reporter_to(receiver, registry)
    expected = []
    for up, down in ((5, 0), (0, 0), (2, 3), (0.5, 0)):
        counter.increment(up)
        counter.decrement(down)
        meter.mark(up)
        reporter.report()
        expected += [f"c:{up - down}|c"] * bool(up - down) + [f"m.count:{up}|c"] * bool(up)
    assert [line for line in receiver.lines() if line.endswith("|c")] == expected


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        (5, ["g:5|g"]),
        (0, ["g:0|g"]),
        (-5, ["g:0|g", "g:-5|g"]),
        (-0.5, ["g:0|g", "g:-0.5|g"]),
        (-0.0, ["g:0|g", "g:-0.0|g"]),
        (1e300, ["g:1e+300|g"]),
    ],
)
def test_a_sign_is_never_taken_for_a_change(receiver, registry, value, lines):
    """A gauge below zero is sent after a zero in the same packet, so its sign is not taken for a change."""
    registry.gauge("g").set(value)
    reporter_to(receiver, registry).report()
    (packet,) = receiver.take()
    assert packet.decode().split("\n") == lines


def test_labels_are_levels_of_the_name(receiver, registry):
    """Labels are sorted levels of the name, before the field; characters that it can't have are replaced."""
    registry.counter("jobs.done", queue="mail", host="a.b:8|c\n").increment()
    registry.meter("größe", x="", y="@#").mark()
    reporter_to(receiver, registry, prefix="shop.eu.").report()
    counts = [line for line in receiver.lines() if line.endswith("|c")]
    assert counts == ["shop.eu.jobs.done.host.a_b_8_c_.queue.mail:1|c", "shop.eu.gr__e.x._.y.__.count:1|c"]


def test_labels_are_tags_on_request(receiver, registry):
    """With ``tags=True`` labels are sent as tags in DogStatsD's form."""
    registry.counter("jobs.done", queue="mail", path="/a,b|c#d é;e:f").increment()
    registry.gauge("g", x="y").set(-1)
    registry.gauge("h").set(1)
    reporter_to(receiver, registry, tags=True).report()
    assert receiver.lines() == [
        "jobs.done:1|c|#path:/a_b_c_d___e:f,queue:mail", "g:0|g|#x:y", "g:-1|g|#x:y", "h:1|g",
    ]  # fmt: skip


def test_packets_are_filled_to_the_mtu(receiver, registry):
    """No packet is longer than the MTU, and none could have contained the next line too."""
    for number in range(500):
        registry.counter(f"some.counter.{number:03}").increment()
        registry.gauge(f"some.gauge.{number:03}").set(-number)
    reporter_to(receiver, registry).report()
    packets = receiver.take()
    for packet, following in itertools.pairwise(packets):
        assert len(packet) <= 1432
        first = following.split(b"\n")
        unit = first[0] if first[0].endswith(b"c") else b"\n".join(first[:2])
        assert len(packet) + 1 + len(unit) > 1432
    assert len(b"\n".join(packets).split(b"\n")) == 500 + 500 + 499


def test_nothing_is_lost_or_doubled_without_a_receiver(receiver, registry):
    """A packet that can't be delivered is counted, and its counts are in the next report."""
    counter = registry.counter("c")
    for number in range(300):  # several packets
        registry.counter(f"one.of.many.{number}").increment(number)
    reporter = reporter_to(receiver, registry)
    for round_ in range(20):
        counter.increment(7)
        if round_ % 5 == 2:
            receiver.close()
            with pytest.raises(ConnectionRefusedError):
                reporter.report()
            with pytest.raises(ConnectionRefusedError):
                reporter.report()
            receiver.open()
        reporter.report()
    counts = receiver.counts()
    assert counts["c"] == 140
    assert {n: counts.get(f"one.of.many.{n}", 0) for n in range(300)} == {n: n for n in range(300)}
    failed = registry.snapshot().get("tapes.statsd.failed", reporter="StatsdReporter").value
    assert counts["tapes.statsd.failed.reporter.StatsdReporter"] == failed
    assert failed >= 8


def test_a_new_reporter_continues_where_the_last_one_stopped(receiver, registry):
    """A new reporter to the same receiver continues the counts; one to another receiver sends all."""
    registry.counter("c").increment(5)
    with reporter_to(receiver, registry):
        registry.counter("c").increment(1)
    with reporter_to(receiver, registry):
        registry.counter("c").increment(1)
    assert receiver.counts() == {"c": 7}
    with contextlib.closing(Receiver()) as another:
        reporter_to(another, registry).report()
        assert another.counts() == {"c": 7}


def test_a_series_that_is_made_again_is_reported_from_zero(receiver, registry):
    """A series that was removed and made again is reported from zero: nothing negative, nothing missing."""
    reporter = reporter_to(receiver, registry)
    for count in (5, 3, 9):
        registry.counter("c").increment(count)
        reporter.report()
        registry.remove("c")
    assert receiver.counts() == {"c": 17}


def test_a_forked_child_reports_its_own_counts(receiver):
    """A forked child reports what it counted itself, and leaves its parent's counts to the parent."""
    registry = tapes.Registry()
    reporter = reporter_to(receiver, registry)
    registry.counter("c").increment(100)
    reporter.report()
    registry.counter("c").increment(20)
    for _ in range(3):
        pid = os.fork()
        if not pid:
            registry.counter("c").increment(1)
            reporter.report()
            registry.counter("c").increment(1)
            with reporter:
                pass
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    reporter.report()
    assert receiver.counts() == {"c": 126}


def test_simultaneous_reports_send_each_count_once(receiver, registry):
    """Threads that report beside the schedule send each count once."""
    counter = registry.counter("c")
    reporter = reporter_to(receiver, registry)

    def work():
        for _ in range(50):
            counter.increment()
            reporter.report()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receiver.counts() == {"c": 200}


class Stream:
    """A listening socket that takes connections one after the other and keeps what they say."""

    def __init__(self, listening):
        self.listening = listening
        listening.listen()
        listening.settimeout(5)
        self.connection = None

    def lines(self, least=1):
        if self.connection is None:
            self.connection, _ = self.listening.accept()
            self.connection.settimeout(5)
        data = b""
        while data.count(b"\n") < least or not data.endswith(b"\n"):
            data += self.connection.recv(1 << 16)
        return data.decode().splitlines()

    def hang_up(self):
        self.connection.close()
        self.connection = None


@pytest.fixture(params=["tcp", "unix"])
def stream(request, short_dir):
    """A stream socket of either family, and the arguments that name it."""
    with socket.socket(socket.AF_INET if request.param == "tcp" else socket.AF_UNIX) as listening:
        if request.param == "tcp":
            listening.bind(("127.0.0.1", 0))
            options = {"host": "127.0.0.1", "port": listening.getsockname()[1]}
        else:
            listening.bind(str(short_dir / "s"))
            options = {"host": f"unix://{short_dir}/s"}
        yield Stream(listening), {**options, "protocol": "tcp"}


def test_a_closed_stream_is_opened_again(stream, registry):
    """A TCP stream that the receiver closed is opened again before the next report, so nothing is lost."""
    receiver, options = stream
    counter = registry.counter("c")
    reporter = StatsdReporter(LONG, registry=registry, **options)
    for _ in range(3):
        for _ in range(2):
            counter.increment(4)
            reporter.report()
            assert receiver.lines() == ["c:4|c"]
        receiver.hang_up()
    reporter.stop()


def test_a_stream_without_a_reader_delays_one_report(stream, registry, monkeypatch):
    """A receiver that does not read delays a report by its timeout; incomplete lines are sent again later."""
    receiver, options = stream
    monkeypatch.setattr("tapes.reporting.transport._TIMEOUT_SECONDS", 0.05)
    for number in range(2000):
        registry.counter(f"c.{number}", one="x" * 1000, two="x" * 1000).increment()
    reporter = StatsdReporter(LONG, registry=registry, **options)
    with pytest.raises(OSError, match=r"broke|timed out"):
        reporter.report()
    connection, _ = receiver.listening.accept()
    told = b""
    while data := connection.recv(1 << 20):
        told += data
    connection.close()
    whole = [line for line in told.split(b"\n")[:-1] if line]
    done = threading.Thread(target=lambda: [reporter.report(), reporter.client.close()])
    done.start()
    connection, _ = receiver.listening.accept()
    rest = b""
    while data := connection.recv(1 << 20):
        rest += data
    done.join()
    connection.close()
    names = [line.partition(b":")[0] for line in whole + rest.split(b"\n") if line.startswith(b"c.")]
    assert len(names) == len(set(names)) == 2000


def test_a_unix_datagram_socket(short_dir, registry):
    """A Unix datagram socket gets larger packets; if the protocol does not fit, the error says so."""
    path = short_dir / "s"
    for number in range(1000):
        registry.counter(f"some.counter.{number:03}").increment()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        StatsdReporter(LONG, f"unix://{path}", registry=registry).report()
        packets = [receiver.recv(1 << 16) for _ in range(3)]
        assert [len(packet) > 7000 for packet in packets] == [True, True, False]
        with pytest.raises(OSError, match="another protocol"):
            StatsdReporter(LONG, f"unix://{path}", registry=registry, protocol="tcp").report()


def test_the_address_is_looked_up_again_after_a_failure(receiver, registry, monkeypatch):
    """After a failure the address is looked up again, and each of several addresses gets its turn."""
    looked_up = []

    def getaddrinfo(host, port, **_):
        looked_up.append(host)
        return [(socket.AF_INET6, 0, 0, "", ("::1", port)), (socket.AF_INET, 0, 0, "", where[0])]

    where = [("127.0.0.1", free_port())]
    monkeypatch.setattr("tapes.reporting.transport.socket.getaddrinfo", getaddrinfo)
    registry.counter("c").increment(3)
    reporter = StatsdReporter(LONG, "statsd.example", receiver.port, registry=registry)
    with pytest.raises(ConnectionRefusedError):
        reporter.report()
    where[0] = ("127.0.0.1", receiver.port)
    with contextlib.suppress(OSError):
        reporter.report()  # the turn of the other address
    reporter.report()
    reporter.report()
    assert len(looked_up) == 3
    assert receiver.counts()["c"] == 3


def test_the_address_is_looked_up_again_now_and_then(receiver, registry, monkeypatch):
    """The address is looked up again from time to time, because a lost datagram gives no error."""
    now = [1000.0]
    monkeypatch.setattr("tapes.reporting.transport.monotonic", lambda: now[0])
    reporter = reporter_to(receiver, registry)
    opened = set()
    for _ in range(3):
        registry.counter("c").increment()
        reporter.report()
        opened.add(reporter.client._transport._opened)
        now[0] += 40
    assert len(opened) == 2
    assert receiver.counts() == {"c": 3}


def test_a_failed_look_up_does_not_turn_to_another_address(receiver, registry, monkeypatch):
    """A failed look-up keeps the address, and the first address gets its turn again after a minute."""
    now = [1000.0]
    monkeypatch.setattr("tapes.reporting.transport.monotonic", lambda: now[0])
    with contextlib.closing(Receiver()) as silent:
        answers = []

        def getaddrinfo(host, port, **_):
            if answers.pop(0) == "fails":
                raise socket.gaierror(-3, "Temporary failure in name resolution")
            return [(socket.AF_INET, 0, 0, "", ("127.0.0.1", one.port)) for one in (receiver, silent)]

        monkeypatch.setattr("tapes.reporting.transport.socket.getaddrinfo", getaddrinfo)
        reporter = StatsdReporter(LONG, "statsd.example", registry=registry)
        for answer in ("works", "fails", "works", "works"):
            answers.append(answer)
            registry.counter("c").increment()
            with contextlib.suppress(socket.gaierror):
                reporter.report()
            now[0] += 61
        assert receiver.counts()["c"] == 4
        assert silent.counts() == {}


def test_a_line_that_is_too_long_prevents_no_other(receiver, registry, caplog):
    """A line that can't be sent is left out, counted and logged, and all others are sent."""
    registry.counter("a").increment()
    registry.counter("b", labels={f"l{number}": "x" * 1000 for number in range(70)}).increment()
    registry.counter("c").increment()
    reporter_to(receiver, registry).report()
    assert receiver.counts() == {"a": 1, "c": 1}
    assert "70345 bytes" in caplog.text
    assert registry.get_stats().tapes.statsd.failed['{reporter="StatsdReporter"}'].value == 1


def test_counts_are_sent_if_the_aggregator_does_not_answer(receiver, short_dir):
    """If the aggregator does not answer, a process sends its own counts, and the report fails."""
    registry = DistributedRegistry(f"ipc://{short_dir}/m.ipc")
    registry.connect()
    registry.counter("c").increment(3)
    registry.gauge("g").set(1)
    with pytest.raises(AggregatorUnavailable):
        reporter_to(receiver, registry).report()
    registry.close()
    assert receiver.lines() == ["c:3|c"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"host": ""}, "a host"),
        ({"host": 5}, "a host"),
        ({"port": 0}, "a port"),
        ({"port": "8125"}, "a port"),
        ({"port": 65536}, "a port"),
        ({"prefix": 5}, "a prefix"),
        ({"protocol": "sctp"}, "udp or tcp"),
        ({"interval": 10}, "timedelta"),
    ],
)
def test_arguments_are_checked(options, expected):
    """A bad argument is refused when the reporter is made."""
    with pytest.raises(InvalidArgument, match=expected):
        StatsdReporter(**{"interval": LONG, **options})


def test_a_schedule_of_reports_arrives(receiver):
    """Scheduled reports and a last one at stop() arrive, and no socket stays open."""
    gc.collect()  # files of other tests
    before = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    registry = tapes.Registry()
    with StatsdReporter(timedelta(milliseconds=5), "127.0.0.1", receiver.port, "p", registry):
        for number in range(1, 11):
            registry.counter("c").increment()
            wait_for(lambda n=number: receiver.counts().get("p.c") == n, "it is told")
        registry.counter("c").increment(5)
    assert receiver.counts()["p.c"] == 15
    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) == before
