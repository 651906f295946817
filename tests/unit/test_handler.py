"""tapes.distributed.aggregator.handler: what an aggregator leaves to its successor."""

from __future__ import annotations

import os

import pytest

import tapes
from tapes import forks, processes
from tapes.clock import monotonic
from tapes.distributed.aggregator.answers import Question
from tapes.distributed.aggregator.handler import Handler
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.protocol.messages import Attach, Goodbye, HandOver, Item, Read, Reply, Update
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.distributed.transport.address import resolve
from tapes.errors import AddressError
from tapes.processes import Process

NOBODY_LIVES = Process(1 << 22, 1)


class Worker:
    """What a worker says, in bytes."""

    def __init__(self, process=None, host=None, **options):
        self.registry = tapes.Registry(**options)
        self.identity = os.urandom(16)
        self.process = process or forks.this_process()
        self.host = host or processes.host_id()

    def update(self):
        items = [Item(*series) for series in self.registry.collect()]
        return Update(self.identity, self.process, self.host, forks.now_ns(), 0, items, {})

    def publication(self):
        return encode(self.update())

    def goodbye(self):
        return encode(Goodbye(7, self.update()))

    def read(self):
        return encode(Read(5, "states", self.update()))


@pytest.fixture
def books(short_dir):
    """Make a bookkeeper of an aggregator at the same address as the last one."""

    def make(lease=None, **configured):
        made = Handler(
            resolve(f"ipc://{short_dir}/m.ipc"), lease or Lifetime.joined(forks.this_process()), configured
        )
        kept.append(made)
        return made

    kept = []
    yield make
    for one in kept:
        one.journal.remove()


def crash(keeper):
    """End it as if it were killed."""
    keeper.journal.close()


def successor(first, books):
    """Return who takes the place of ``first``, which was killed, and knows what that had written."""
    crash(first)
    second = books()
    second.restore()
    return second


def answered(keeper, question):
    """Return what is sent as the answer to ``question``."""
    answer = keeper.answer(question)
    if isinstance(answer, Question):
        answer = encode(Reply(answer.correlation, *keeper.render(answer.what)))
    return answer


def of_version(version, message):
    """Return a message as a release of that version of the wire sends it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tapes.distributed.protocol.wire.VERSION", version)
        return encode(message)


def values(keeper, *names):
    snapshot = keeper.registry.snapshot()
    found = [snapshot.get(name) for name in names]
    return [None if series is None else series.value for series in found]


def write(keeper):
    while keeper.journal.step(monotonic() + 100):
        pass


def test_what_workers_that_left_had_counted_outlives_the_aggregator(books, short_dir):
    """From the tail, from the journal, and from both."""
    first, total = books(), 0
    for turn in range(6):
        worker = Worker()
        worker.registry.counter("c").increment(10**turn)
        total += 10**turn
        assert decode(first.answer(worker.goodbye())) == Reply(7, "ok", b"")
        if turn in (1, 3):
            write(first)
    crash(first)
    for _ in range(3):  # not even one that could write nothing loses anything
        second = books()
        second.restore()
        assert values(second, "c") == [total]
        crash(second)
    third = books()
    third.restore()
    write(third)
    crash(third)
    assert sorted(path.name for path in short_dir.iterdir()) == ["m.ipc.journal"]
    last = books()
    last.restore()
    assert (values(last, "c"), last.registry.snapshot().get("tapes.workers", state="retired").value) == (
        [total],
        6,
    )


def test_a_crash_before_the_first_second_is_over_loses_nothing(books):
    """The journal is there before anybody is heard."""
    first, worker = books(), Worker()
    assert first.journal.finish()
    worker.registry.counter("c").increment(3)
    first.answer(worker.goodbye())
    second = successor(first, books)
    assert values(second, "c") == [3]


def test_last_words_count_once_however_often_they_are_said(books):
    """To the one before, in the tail, in the journal, to the one after, and in a will."""
    worker = Worker()
    worker.registry.counter("c").increment(3)
    goodbye = worker.goodbye()
    first = books()
    first.answer(goodbye)
    write(first)
    first.answer(goodbye)
    second = successor(first, books)
    second.answer(goodbye)
    second.publication(worker.publication())
    assert values(second, "c") == [3]


def test_a_tail_that_is_cut_short_is_read_as_far_as_it_goes(books, short_dir):
    """As when the disk filled up, or the aggregator was killed while it wrote."""
    first, workers = books(), [Worker() for _ in range(3)]
    write(first)
    first.journal.changed()
    write(first)
    for worker in workers:
        worker.registry.counter("c").increment()
        first.answer(worker.goodbye())
    crash(first)
    (tail,) = short_dir.glob("*.tail-*")
    tail.write_bytes(tail.read_bytes()[:-1])
    second = books()
    second.restore()
    assert values(second, "c") == [2]


def test_no_reader_is_answered_before_live_workers_have_told_it_again(books):
    """What they told in the last second before the crash is in no journal."""
    worker, first = Worker(), books()
    worker.registry.counter("c").increment(5)
    first.publication(worker.publication())
    write(first)
    worker.registry.counter("c").increment(1)
    first.publication(worker.publication())
    assert values(first, "c") == [6]
    crash(first)
    second, reader = books(), Worker()
    second.restore()
    assert second.awaited == {worker.identity}
    assert second.answer(reader.read()) is None
    assert decode(second.answer(encode(Attach(1, processes.host_id(), ())))).status == "ok"
    second.publication(worker.publication())
    assert second.awaited == set()
    assert decode(answered(second, reader.read())).status == "ok"
    assert values(second, "c") == [6]


def test_a_worker_that_was_just_heard_of_is_awaited_too(books):
    """Somebody may have read what it told before it was in the journal."""
    old, new, first = Worker(), Worker(), books()
    first.publication(old.publication())
    write(first)
    first.publication(new.publication())
    second = successor(first, books)
    assert second.awaited == {old.identity, new.identity}


def test_a_worker_that_died_with_the_aggregator_counts_as_the_journal_knows_it(books):
    """Nobody waits for it."""
    worker, first = Worker(process=NOBODY_LIVES), books()
    worker.registry.counter("c").increment(5)
    worker.registry.gauge("g").set(5)
    first.publication(worker.publication())
    write(first)
    second = successor(first, books)
    second.reap_workers(monotonic())
    assert (second.awaited, values(second, "c", "g")) == (set(), [5, None])
    second.reap_workers(monotonic() + 3)
    assert values(second, "c") == [5]


def test_at_the_cap_of_label_sets_nothing_changes_its_place(books):
    """What left had its own series, and goes on in it."""
    gone, late, first = Worker(max_series=2), Worker(max_series=2), books()
    for number in range(2000):
        gone.registry.counter("c", n=number)
    gone.registry = tapes.Registry(max_series=2000)
    for number in range(2000):
        gone.registry.counter("c", n=number).increment()
    first.answer(gone.goodbye())
    late.registry.counter("c", n="late").increment(7)
    first.publication(late.publication())
    before = first.registry.snapshot().stats()
    write(first)
    second = successor(first, books)
    assert second.registry.snapshot().stats().c == before.c
    assert second.registry.snapshot().get("c", n="0").value == 1


def test_baselines_are_what_they_were(books):
    """Of workers in the journal and in its tail; what was sent is in the cursors (`test_cursors`)."""
    first, in_journal, in_tail = books(), Worker(), Worker()
    for worker, baseline, more in ((in_journal, 5, 1), (in_tail, 7, 2)):
        counter = worker.registry.counter("c")
        counter.increment(baseline)
        counter.note_baseline(counter.collect())
        counter.increment(more)
    first.answer(in_journal.goodbye())
    write(first)
    first.answer(in_tail.goodbye())
    second = successor(first, books)
    merged = decode(decode(answered(second, Worker().read())).payload)
    (state,) = [item.state for item in merged.items if item.name == "c"]
    assert (state.counted, state.origin.baseline) == (15, 12)


def test_a_disk_that_is_full_costs_nothing_once_there_is_room(books, short_dir, monkeypatch):
    """Neither the file nor the tail is left in pieces, and a hand-over is refused."""
    first, worker = books(), Worker()
    worker.registry.counter("c").increment(5)
    real, room = os.write, [0]

    def write_some(fd, data):
        if room[0] < len(data) and os.path.dirname(os.readlink(f"/proc/self/fd/{fd}")) == str(short_dir):
            if room[0] == 0:
                raise OSError(28, "No space left on device")
            data, room[0] = data[: room[0]], 0
        return real(fd, data)

    monkeypatch.setattr(os, "write", write_some)
    for room[0] in (0, 3, 20):
        assert decode(first.answer(worker.goodbye())).status == "ok"
        write(first)
    question = encode(HandOver(1, VERSION + 1))
    assert (decode(first.answer(question)).status, first.hands_over) == ("error", False)
    assert values(first, "tapes.journal.failed")[0] >= 4
    monkeypatch.undo()
    other = Worker()
    other.registry.counter("c").increment(2)
    first.answer(other.goodbye())
    write(first)
    second = successor(first, books)
    assert values(second, "c") == [7]


def test_a_rate_and_a_quantile_are_what_they_were(books, monkeypatch):
    """A recent view and rates decay on from where they stood."""
    worker, first = Worker(), books()
    for number in range(500):
        worker.registry.timer("t").update(0.001 * (number % 90))
        worker.registry.meter("m").mark(2)
    first.answer(worker.goodbye())
    monkeypatch.setattr("tapes.distributed.aggregator.merged_view.monotonic", lambda: 1e6)
    before = first.registry.snapshot().stats()
    write(first)
    second = successor(first, books)
    after = second.registry.snapshot().stats()
    assert (before.t, before.m) == (after.t, after.m)


def test_what_the_aggregator_counted_itself_goes_on(books):
    """So that no counter of the service decreases; what only one process tells begins anew."""
    first = books()
    first.publication(b"garbage")
    first.publication(b"more")
    write(first)
    second = successor(first, books)
    second.publication(b"again")
    assert values(second, "tapes.rejected", "tapes.messages") == [3, 1]


def test_the_journal_of_a_service_that_has_ended_is_nobodys(books, short_dir):
    """Its owner and its workers were killed with it: who starts there now is another service."""
    worker, first = Worker(process=NOBODY_LIVES), books(Lifetime.joined(NOBODY_LIVES))
    worker.registry.counter("c").increment()
    first.answer(worker.goodbye())
    write(first)
    (short_dir / "m.ipc.spool-00").write_bytes(b"")
    second = successor(first, books)
    assert (values(second, "c"), list(short_dir.iterdir())) == ([None], [])


def test_owners_and_reporters_are_handed_down(books):
    """Whoever starts the next one need not know them."""
    first = books(TAPES_HTTP="1234")
    first.journal.changed()
    write(first)
    crash(first)
    lease = Lifetime.joined(forks.this_process(), NOBODY_LIVES)
    second = books(lease)
    assert second.restore() == {"TAPES_HTTP": "1234"}
    assert forks.this_process() in lease.owners


@pytest.mark.parametrize("content", [b"precious", b"tapes journal\n\x00\x00"])
def test_somebodys_file_is_left_alone(books, short_dir, content):
    """And a journal that says nothing is no obstacle."""
    path = short_dir / "m.ipc.journal"
    path.write_bytes(content)
    if content == b"precious":
        keeper = books()
        with pytest.raises(AddressError, match="not a journal of this user"):
            keeper.restore()
        keeper.journal.remove()
        assert path.read_bytes() == content
        path.unlink()
    else:
        assert books().restore() == {}


def test_a_journal_that_cannot_be_read_is_counted_and_no_obstacle(books, short_dir):
    """Of a version to come, or damaged."""
    first, worker = books(), Worker()
    worker.registry.counter("c").increment()
    first.answer(worker.goodbye())
    write(first)
    crash(first)
    path = short_dir / "m.ipc.journal"
    data = bytearray(path.read_bytes())
    data[len(b"tapes journal\n") + 9] = VERSION + 1
    path.write_bytes(data)
    with pytest.raises(AddressError, match="newer release"):  # one of whose workers is to start it
        books().restore()
    assert path.read_bytes() == data
    os.utime(path, (1, 1))
    second = books()
    second.restore()
    assert values(second, "tapes.rejected", "c") == [1, None]


def test_an_aggregator_makes_room_for_a_newer_version_only(books):
    """And only if workers can start another one."""
    for lease, version, status in (
        (Lifetime.joined(forks.this_process()), VERSION + 1, "ok"),
        (Lifetime.joined(forks.this_process()), VERSION, "error"),
        (Lifetime.joined(forks.this_process()), VERSION - 1, "error"),
        (Lifetime(forks.this_process()), VERSION + 1, "error"),
    ):
        keeper, worker = books(lease), Worker()
        worker.registry.counter("c").increment(2)
        keeper.answer(worker.goodbye())
        question = of_version(version, HandOver(1, version))
        assert (decode(keeper.answer(question)).status, keeper.hands_over) == (status, status == "ok")
        crash(keeper)
        if status == "ok":
            newer = books()
            newer.restore()
            assert values(newer, "c") == [2]
            newer.journal.remove()
        keeper.journal.remove()


def test_a_worker_of_the_release_before_is_answered(books, monkeypatch):
    """Its publications count, and its requests are answered."""
    keeper, worker = books(), Worker()
    worker.registry.counter("c").increment(2)
    monkeypatch.setattr("tapes.distributed.protocol.wire.READABLE", range(VERSION, VERSION + 2))
    monkeypatch.setattr("tapes.distributed.protocol.wire.VERSION", VERSION + 1)
    keeper.publication(of_version(VERSION, worker.update()))
    for question in (Read(5, "json", worker.update()), Attach(5, processes.host_id(), ())):
        answer = answered(keeper, of_version(VERSION, question))
        assert answer[1] == VERSION + 1
        monkeypatch.undo()
        reply = decode(answer)  # as the older worker does
        assert (reply.correlation, reply.status) == (5, "ok")
        monkeypatch.setattr("tapes.distributed.protocol.wire.READABLE", range(VERSION, VERSION + 2))
        monkeypatch.setattr("tapes.distributed.protocol.wire.VERSION", VERSION + 1)
    assert values(keeper, "c") == [2]


def test_a_worker_whose_pid_means_nothing_here_is_dead_when_it_is_silent(books):
    """As in another container: its gauges leave, and return when it speaks again; its counts stay."""
    keeper, worker = books(), Worker(host="elsewhere")
    worker.registry.counter("c").increment(2)
    worker.registry.gauge("g").set(7)
    keeper.publication(worker.publication())
    assert keeper.reap_workers(1000.0) == 1
    assert keeper.reap_workers(1059.0) == 1
    assert keeper.reap_workers(1061.0) == 0
    assert values(keeper, "c", "g") == [2, None]
    worker.registry.counter("c").increment()
    keeper.publication(worker.publication())
    assert keeper.reap_workers(1062.0) == 1
    keeper.publication(worker.publication())
    assert values(keeper, "c", "g") == [3, 7]
    for now in (1200.0, 1261.0, 99999.0):
        keeper.reap_workers(now)
    assert values(keeper, "c", "g") == [3, None]
    worker.registry.counter("c").increment()
    keeper.publication(worker.publication())
    assert values(keeper, "c") == [4]
