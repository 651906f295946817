"""tapes.distributed.storage.journal and aggregator.checkpoint: what an aggregator leaves to its successor."""

from __future__ import annotations

import os

import pytest

import tapes
from tapes import forks
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.protocol.messages import HandOver, Reply
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.errors import AddressError
from tests.unit.handlers import DEAD_PROCESS, Worker, answered, crash, successor, values, write


def test_counts_of_exited_workers_outlive_the_aggregator(make_handler, short_dir):
    """A successor has the counts of exited workers from the tail, from the journal, and from both."""
    first, total = make_handler(), 0
    for turn in range(6):
        worker = Worker()
        worker.registry.counter("c").increment(10**turn)
        total += 10**turn
        assert decode(first.answer(worker.goodbye())) == Reply(7, "ok", b"")
        if turn in (1, 3):
            write(first)
    crash(first)
    for _ in range(3):  # not even one that could write nothing loses anything
        second = make_handler()
        second.restore()
        assert values(second, "c") == [total]
        crash(second)
    third = make_handler()
    third.restore()
    write(third)
    crash(third)
    assert sorted(path.name for path in short_dir.iterdir()) == ["m.ipc.journal"]
    last = make_handler()
    last.restore()
    assert (values(last, "c"), last.registry.snapshot().get("tapes.workers", state="retired").value) == (
        [total],
        6,
    )


def test_a_crash_within_the_first_second_loses_nothing(make_handler):
    """The journal is written before the first message is handled."""
    first, worker = make_handler(), Worker()
    assert first.journal.finish()
    worker.registry.counter("c").increment(3)
    first.answer(worker.goodbye())
    second = successor(first, make_handler)
    assert values(second, "c") == [3]


def test_a_last_update_counts_once_however_often_it_arrives(make_handler):
    """It may be in the journal, in its tail, and in messages to both aggregators."""
    worker = Worker()
    worker.registry.counter("c").increment(3)
    goodbye = worker.goodbye()
    first = make_handler()
    first.answer(goodbye)
    write(first)
    first.answer(goodbye)
    second = successor(first, make_handler)
    second.answer(goodbye)
    second.publication(worker.publication())
    assert values(second, "c") == [3]


def test_an_incomplete_tail_is_read_up_to_its_last_complete_message(make_handler, short_dir):
    """The disk may be full, or the aggregator may be killed while it writes."""
    first, workers = make_handler(), [Worker() for _ in range(3)]
    write(first)
    first.journal.changed()
    write(first)
    for worker in workers:
        worker.registry.counter("c").increment()
        first.answer(worker.goodbye())
    crash(first)
    (tail,) = short_dir.glob("*.tail-*")
    tail.write_bytes(tail.read_bytes()[:-1])
    second = make_handler()
    second.restore()
    assert values(second, "c") == [2]


def test_series_keep_their_slots_at_the_cap_of_label_sets(make_handler):
    """The series of an exited worker have their own slots in the successor, too."""
    gone, late, first = Worker(max_series=2), Worker(max_series=2), make_handler()
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
    second = successor(first, make_handler)
    assert second.registry.snapshot().stats().c == before.c
    assert second.registry.snapshot().get("c", n="0").value == 1


def test_baselines_are_what_they_were(make_handler):
    """Of workers in the journal and in its tail; what was sent is in the cursors (`test_cursor`)."""
    first, in_journal, in_tail = make_handler(), Worker(), Worker()
    for worker, baseline, more in ((in_journal, 5, 1), (in_tail, 7, 2)):
        counter = worker.registry.counter("c")
        counter.increment(baseline)
        counter.note_baseline(counter.collect())
        counter.increment(more)
    first.answer(in_journal.goodbye())
    write(first)
    first.answer(in_tail.goodbye())
    second = successor(first, make_handler)
    merged = decode(decode(answered(second, Worker().read())).payload)
    (state,) = [item.state for item in merged.items if item.name == "c"]
    assert (state.counted, state.origin.baseline) == (15, 12)


def test_a_full_disk_costs_nothing_once_there_is_room(make_handler, short_dir, monkeypatch):
    """Neither the journal nor its tail is left incomplete, and a hand-over is refused."""
    first, worker = make_handler(), Worker()
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
    second = successor(first, make_handler)
    assert values(second, "c") == [7]


def test_rates_and_quantiles_survive_a_restart(make_handler, monkeypatch):
    """They decay from their values in the journal."""
    worker, first = Worker(), make_handler()
    for number in range(500):
        worker.registry.timer("t").update(0.001 * (number % 90))
        worker.registry.meter("m").mark(2)
    first.answer(worker.goodbye())
    monkeypatch.setattr("tapes.distributed.aggregator.merged_view.monotonic", lambda: 1e6)
    before = first.registry.snapshot().stats()
    write(first)
    second = successor(first, make_handler)
    after = second.registry.snapshot().stats()
    assert (before.t, before.m) == (after.t, after.m)


def test_counts_of_the_aggregator_itself_continue(make_handler):
    """No counter of the service decreases; metrics of one aggregator process begin at zero."""
    first = make_handler()
    first.publication(b"garbage")
    first.publication(b"more")
    write(first)
    second = successor(first, make_handler)
    second.publication(b"again")
    assert values(second, "tapes.rejected", "tapes.messages") == [3, 1]


def test_the_journal_of_a_dead_service_is_removed(make_handler, short_dir):
    """If its owner and its workers were killed too, the next service does not get its counts."""
    worker, first = Worker(process=DEAD_PROCESS), make_handler(Lifetime.joined(DEAD_PROCESS))
    worker.registry.counter("c").increment()
    first.answer(worker.goodbye())
    write(first)
    (short_dir / "m.ipc.spool-00").write_bytes(b"")
    second = successor(first, make_handler)
    assert (values(second, "c"), list(short_dir.iterdir())) == ([None], [])


def test_a_successor_has_the_owners_and_the_reporters(make_handler):
    """The process that starts it need not know them."""
    first = make_handler(TAPES_HTTP="1234")
    first.journal.changed()
    write(first)
    crash(first)
    lease = Lifetime.joined(forks.this_process(), DEAD_PROCESS)
    second = make_handler(lease)
    assert second.restore() == {"TAPES_HTTP": "1234"}
    assert forks.this_process() in lease.owners


@pytest.mark.parametrize("content", [b"precious", b"tapes journal\n\x00\x00"])
def test_another_file_is_left_alone(make_handler, short_dir, content):
    """A file that is no journal is an error and stays; an empty journal is no obstacle."""
    path = short_dir / "m.ipc.journal"
    path.write_bytes(content)
    if content == b"precious":
        keeper = make_handler()
        with pytest.raises(AddressError, match="not a journal of this user"):
            keeper.restore()
        keeper.journal.remove()
        assert path.read_bytes() == content
        path.unlink()
    else:
        assert make_handler().restore() == {}


def test_an_unreadable_journal_is_counted_and_no_obstacle(make_handler, short_dir):
    """A journal of a newer version stays for a while; after that it counts as rejected."""
    first, worker = make_handler(), Worker()
    worker.registry.counter("c").increment()
    first.answer(worker.goodbye())
    write(first)
    crash(first)
    path = short_dir / "m.ipc.journal"
    data = bytearray(path.read_bytes())
    data[len(b"tapes journal\n") + 9] = VERSION + 1
    path.write_bytes(data)
    with pytest.raises(AddressError, match="newer release"):  # one of whose workers is to start it
        make_handler().restore()
    assert path.read_bytes() == data
    os.utime(path, (1, 1))
    second = make_handler()
    second.restore()
    assert values(second, "tapes.rejected", "c") == [1, None]
