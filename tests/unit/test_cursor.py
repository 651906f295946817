"""tapes.reporting.cursor in an aggregator: however aggregators end, StatsD gets each count once."""

from __future__ import annotations

import collections
import random
from datetime import timedelta

import pytest

import tapes
from tapes import forks, processes
from tapes.clock import monotonic
from tapes.distributed.protocol.messages import Goodbye, Item, Read, Update
from tapes.distributed.protocol.wire import decode, encode
from tapes.distributed.worker.outbox import Outbox
from tapes.reporting.statsd import StatsdReporter
from tests.unit.handlers import DEAD_PROCESS, answered, crash, write

HOUR = timedelta(hours=1)


class Statsd:
    """A receiver that adds up the counts that it is sent."""

    def __init__(self, monkeypatch, port=8125):
        self.port = port
        self.counts = collections.Counter()
        self.lines = []
        self.others = []
        self.is_up = True
        self._patch = monkeypatch
        monkeypatch.setattr("tapes.reporting.transport.Transport.send", lambda _, lines: self.send(lines))

    def send(self, lines):
        if not self.is_up:
            raise ConnectionRefusedError
        for line in b"\n".join(lines).decode().split("\n"):
            name, _, rest = line.partition(":")
            if rest.endswith("|c") and not name.startswith("tapes."):
                self.lines.append(line)
                self.counts[name] += float(rest[:-2])
            else:
                self.others.append(line)
        return len(lines)

    def get_report_of(self, keeper):
        StatsdReporter(HOUR, "127.0.0.1", self.port, registry=keeper.registry).report()


@pytest.fixture
def statsd(monkeypatch):
    return Statsd(monkeypatch)


class Worker:
    """A worker that publishes as real ones do, to whichever aggregator a test gives it."""

    def __init__(self, **options):
        self.registry = tapes.Registry(**options)
        self.outbox = Outbox(self.registry)
        self.aggregator = None

    def count(self, n=1, name="c", **labels):
        self.registry.counter(name, **labels).increment(n)

    def subscribe(self, keeper):
        """Find an aggregator: another one, or the same after a broken connection."""
        self.aggregator = keeper
        self.outbox.reset_baselines()
        self.publish(keyframe=True)

    def publish(self, **options):
        self.outbox.publish(lambda update: self.aggregator.publication(encode(update)) or True, **options)

    def read(self, keeper):
        for keyframe in (False, True):
            answer = answered(keeper, encode(Read(1, "states", self.outbox.update(keyframe=keyframe))))
            if answer is None or decode(answer).status == "ok":
                return

    def leave(self, keeper):
        goodbye = self.outbox.drain()
        if keeper is not self.aggregator:
            goodbye = self.outbox.for_another(goodbye)
        assert decode(keeper.answer(encode(Goodbye(1, goodbye)))).status == "ok"


def successor_of(keeper, make_handler, *workers):
    """Kill an aggregator; return the next one, which ``workers`` have found."""
    crash(keeper)
    following = make_handler()
    following.restore()
    for worker in workers:
        worker.subscribe(following)
    return following


@pytest.mark.parametrize("writes", [True, False], ids=["journal", "tail"])
def test_a_successor_sends_what_was_not_sent_and_nothing_twice(make_handler, statsd, writes):
    """Whether the journal has the last report or only its tail."""
    first, one, two = make_handler(), Worker(), Worker()
    assert first.journal.finish()
    for worker in (one, two):
        worker.subscribe(first)
    one.count(10)
    one.publish()
    statsd.get_report_of(first)
    assert statsd.counts == {"c": 10}
    if writes:
        write(first)
    one.count(5)
    two.count(7)
    one.publish()
    two.publish()
    two.leave(first)
    one.count(100)  # not even published
    second = successor_of(first, make_handler, one)
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 122}
    statsd.get_report_of(successor_of(second, make_handler, one))
    assert statsd.counts == {"c": 122}


def test_a_kill_between_a_move_and_its_packet_loses_that_packet_only(make_handler, statsd, monkeypatch):
    """The cursor is in the journal before the packet goes out."""
    first, worker = make_handler(), Worker()
    assert first.journal.finish()
    worker.subscribe(first)
    worker.count(10)
    worker.publish()
    with monkeypatch.context() as patch:
        patch.setattr("tapes.reporting.cursor.Cursor.move_back", lambda *_: None)
        statsd.is_up = False
        with pytest.raises(ConnectionRefusedError):
            statsd.get_report_of(first)
        statsd.is_up = True
    worker.count(3)
    statsd.get_report_of(successor_of(first, make_handler, worker))
    assert statsd.counts == {"c": 3}


def test_what_could_not_be_sent_is_sent_by_the_successor(make_handler, statsd):
    """A failed send moves the cursor back, in the journal too."""
    first, worker = make_handler(), Worker()
    assert first.journal.finish()
    worker.subscribe(first)
    for number in range(200):
        worker.count(1, f"some.long.name.of.a.counter.{number}")
    worker.publish()
    statsd.is_up = False
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            statsd.get_report_of(first)
    statsd.is_up = True
    statsd.get_report_of(successor_of(first, make_handler, worker))
    assert sum(statsd.counts.values()) == len(statsd.lines) == 200


def test_counts_wait_while_the_journal_cannot_be_written(make_handler, statsd, monkeypatch):
    """A successor would send them again; gauges are sent, and the next report has the counts."""
    first, worker = make_handler(), Worker()
    assert first.journal.finish()
    worker.subscribe(first)
    worker.count(10)
    worker.registry.gauge("g").set(5)
    worker.publish()
    with monkeypatch.context() as patch:
        patch.setattr("tapes.distributed.storage.journal._write", refuse)
        with pytest.raises(OSError, match="wait for the next report"):
            statsd.get_report_of(first)
    assert (statsd.counts, "g:5|g" in statsd.others) == ({}, True)
    statsd.get_report_of(first)
    worker.count(1)
    statsd.get_report_of(successor_of(first, make_handler, worker))
    assert statsd.counts == {"c": 11}


def refuse(fd, data):
    raise OSError(28, "No space left on device")


def test_without_a_journal_only_new_counts_are_sent(make_handler, statsd, short_dir):
    """The worker knows what an earlier aggregator had; the rest is new."""
    first, live, leaves = make_handler(), Worker(), Worker()
    for worker in (live, leaves):
        worker.subscribe(first)
        worker.count(10)
        worker.publish()
    statsd.get_report_of(first)
    for worker in (live, leaves):
        worker.count(5)
    crash(first)
    for path in short_dir.iterdir():
        path.unlink()
    second = make_handler()
    second.restore()
    live.subscribe(second)
    leaves.leave(second)
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 30}


def test_a_receiver_that_the_journal_does_not_know_gets_no_history(make_handler, statsd, monkeypatch):
    """Neither of live workers nor of retired ones, as another reporter may have sent it there."""
    first, live, gone = make_handler(), Worker(), Worker()
    for worker in (live, gone):
        worker.subscribe(first)
        worker.count(10)
    gone.leave(first)
    live.publish()
    write(first)
    second = successor_of(first, make_handler, live)
    statsd.get_report_of(second)
    live.count(2)
    live.publish()
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 2}
    live.count(3)
    live.publish()
    statsd.get_report_of(successor_of(second, make_handler, live))
    assert statsd.counts == {"c": 5}


def test_a_receiver_that_was_sent_nothing_yet_gets_everything_of_the_successor(make_handler, statsd):
    """The first report comes before the first count."""
    first, worker = make_handler(), Worker()
    assert first.journal.finish()
    statsd.get_report_of(first)
    worker.subscribe(first)
    worker.count(10)
    worker.publish()
    statsd.get_report_of(successor_of(first, make_handler, worker))
    assert statsd.counts == {"c": 10}


def test_a_stopped_worker_is_missing_for_a_while_and_nothing_is_sent_twice(make_handler, statsd):
    """What it had sent in the last second is in no journal; the others' counts are sent when it is back."""
    first, stopped, live = make_handler(), Worker(), Worker()
    assert first.journal.finish()
    for worker in (stopped, live):
        worker.subscribe(first)
    write(first)
    stopped.count(100)
    stopped.count(5, "d")
    stopped.publish()
    statsd.get_report_of(first)
    second = successor_of(first, make_handler, live)
    live.count(7)
    live.count(7, "d")
    live.publish()
    for _ in range(3):
        statsd.get_report_of(second)
    assert statsd.counts == {"c": 100, "d": 7}
    second = successor_of(second, make_handler, live)
    statsd.get_report_of(second)
    stopped.count(1)
    stopped.subscribe(second)
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 108, "d": 12}


def test_a_worker_that_comes_back_during_a_report_is_not_sent_twice(make_handler, statsd, monkeypatch):
    """The report has the counts without it, and the next one has what is new."""
    first, stopped, live = make_handler(), Worker(), Worker()
    assert first.journal.finish()
    for worker in (stopped, live):
        worker.subscribe(first)
    write(first)
    stopped.count(100)
    stopped.count(5, "d")
    stopped.publish()
    statsd.get_report_of(first)
    second = successor_of(first, make_handler, live)
    snapshot = second.registry.snapshot

    def snapshot_then_come_back():
        try:
            return snapshot()
        finally:
            stopped.subscribe(second)

    with monkeypatch.context() as patch:
        patch.setattr(second.registry, "snapshot", snapshot_then_come_back)
        statsd.get_report_of(second)
    stopped.count(1)
    stopped.publish()
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 101, "d": 5}


def test_the_loss_of_a_dead_worker_holds_up_the_others_until_it_is_retired(make_handler, statsd):
    """What it had published in its last second is gone; StatsD has it, and gets all that follows."""
    first, dead, live = make_handler(), Worker(), Worker()
    assert first.journal.finish()
    dead.outbox._process = DEAD_PROCESS
    for worker in (dead, live):
        worker.subscribe(first)
    write(first)
    dead.count(100)
    dead.publish()
    statsd.get_report_of(first)
    second = successor_of(first, make_handler, live)
    now = monotonic()
    second.reap_workers(now)
    second.reap_workers(now + 3)
    statsd.get_report_of(second)
    live.count(7)
    live.publish()
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 107}


def test_a_series_that_a_worker_removed_is_not_sent_again(make_handler, statsd):
    """Neither after a crash, nor when it is made again."""
    first, one, two = make_handler(), Worker(), Worker()
    for worker in (one, two):
        worker.subscribe(first)
        worker.count(10)
        worker.publish()
    statsd.get_report_of(first)
    write(first)
    one.registry.remove("c")
    one.publish()
    second = successor_of(first, make_handler, one, two)
    statsd.get_report_of(second)
    one.count(3)
    two.count(4)
    for worker in (one, two):
        worker.publish()
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 27}


def test_series_keep_their_slots_at_the_cap(make_handler, statsd):
    """Whatever the order in which workers come back, none moves between its own slot and the overflow."""
    first, early, late = make_handler(), Worker(max_series=9000), Worker(max_series=9000)
    early.outbox.registry.max_series = late.outbox.registry.max_series = 2000
    assert first.journal.finish()
    for worker, start in ((early, 0), (late, 1500)):
        worker.subscribe(first)
        for number in range(start, start + 1500):
            worker.count(1, number=number)
        worker.publish()
        statsd.get_report_of(first)
    assert sum(statsd.counts.values()) == 3000
    assert statsd.counts["c.overflow.true"] == 1000
    second = successor_of(first, make_handler, late, early)
    for worker, start in ((early, 0), (late, 1500)):
        for number in range(start, start + 1500):
            worker.count(1, number=number)
        worker.publish()
    statsd.get_report_of(second)
    assert statsd.counts["c.overflow.true"] == 2000
    assert sum(statsd.counts.values()) == 6000


def test_the_record_of_an_ancestor_is_sent_once(make_handler, statsd):
    """By whichever child brings it, to whichever aggregator, and when the ancestor comes itself."""
    parent = Worker()
    parent.count(10)
    record = Update(
        parent.registry.lineage.identity, forks.this_process(), processes.host_id(), 5, 0,
        [Item(*series) for series in parent.registry.collect()], {},
    )  # fmt: skip

    def bring(child, keeper):
        child.count(1)
        keeper.publication(encode(child.outbox.update(keyframe=True)._replace(ancestors=(record,))))

    one, two, first = Worker(), Worker(), make_handler()
    assert first.journal.finish()
    bring(one, first)
    statsd.get_report_of(first)
    second = successor_of(first, make_handler)
    statsd.get_report_of(second)
    for child in (one, two):
        bring(child, second)
    statsd.get_report_of(second)
    assert statsd.counts == {"c": 13}
    parent.count(100)
    parent.subscribe(second)
    third = successor_of(second, make_handler, parent)
    for child in (one, two):
        bring(child, third)
    statsd.get_report_of(third)
    assert statsd.counts == {"c": 115}


@pytest.mark.parametrize("seed", range(15))
def test_whatever_happens_the_sum_is_what_was_recorded(make_handler, statsd, seed):
    """Workers, publications, reads, goodbyes, reports and crashes at random, against a count by hand."""
    rng = random.Random(seed)
    keeper = make_handler()
    assert keeper.journal.finish()
    statsd.get_report_of(keeper)
    workers: list[Worker] = []
    total = collections.Counter()

    def record():
        for worker in rng.sample(workers, len(workers)):
            if rng.random() < 0.5:
                n, name = rng.randint(1, 100), rng.choice("abc")
                worker.count(n, name)
                total[name] += n

    for _ in range(150):
        record()
        action = rng.choice(
            ["come", "publish", "publish", "read", "report", "report", "write", "leave", "crash"]
        )
        worker = rng.choice(workers) if workers else None
        if action == "come" and len(workers) < 4:
            workers.append(Worker())
            if rng.random() < 0.3:
                record()
                workers[-1].read(keeper)
            workers[-1].subscribe(keeper)
        elif action == "publish" and worker:
            worker.publish()
        elif action == "read" and worker:
            worker.read(keeper)
        elif action == "report":
            statsd.is_up = rng.random() < 0.8
            try:
                statsd.get_report_of(keeper)
            except ConnectionRefusedError:
                assert not statsd.is_up
            statsd.is_up = True
        elif action == "write":
            write(keeper)
        elif action == "leave" and worker:
            workers.remove(worker)
            worker.leave(keeper)
        elif action == "crash":
            crash(keeper)
            keeper = make_handler()
            keeper.restore()
            for one in rng.sample(workers, len(workers)):
                record()
                if rng.random() < 0.3:
                    one.read(keeper)
                if rng.random() < 0.3:
                    statsd.get_report_of(keeper)  # the others are missing
                if rng.random() < 0.1:
                    workers.remove(one)
                    one.leave(keeper)
                else:
                    one.subscribe(keeper)
    for worker in workers:
        worker.publish()
    statsd.get_report_of(keeper)
    assert statsd.counts == total
    assert not [line for line in statsd.lines if ":-" in line]


@pytest.mark.parametrize("seed", range(8))
def test_without_journals_nothing_is_sent_twice(make_handler, statsd, short_dir, seed):
    """Each aggregator sends what is new to it; what it had not sent when it was killed is lost."""
    rng = random.Random(seed)
    keeper, workers = make_handler(), [Worker() for _ in range(3)]
    for worker in workers:
        worker.subscribe(keeper)
    recorded = sent_at_least = 0
    for _ in range(100):
        worker = rng.choice(workers)
        worker.count(n := rng.randint(1, 100))
        recorded += n
        if rng.random() < 0.5:
            worker.publish()
        if rng.random() < 0.3:
            for one in workers:
                one.publish()
            statsd.get_report_of(keeper)
            sent_at_least += 1
        if rng.random() < 0.1:
            crash(keeper)
            for path in short_dir.iterdir():
                path.unlink()
            keeper = make_handler()
            keeper.restore()
            for one in workers:
                one.subscribe(keeper)
        assert statsd.counts["c"] <= recorded
    assert statsd.counts["c"] > recorded / 3
