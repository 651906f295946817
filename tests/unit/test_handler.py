"""tapes.distributed.aggregator.handler: messages, dead workers, and successors of an aggregator."""

from __future__ import annotations

from tapes import forks, processes
from tapes.clock import monotonic
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.protocol.messages import Attach, HandOver, Read
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tests.unit.handlers import DEAD_PROCESS, Worker, answered, crash, of_version, successor, values, write


def test_no_read_is_answered_before_live_workers_have_sent_their_states_again(make_handler):
    """Updates of the last second before the crash are in no journal."""
    worker, first = Worker(), make_handler()
    worker.registry.counter("c").increment(5)
    first.publication(worker.publication())
    write(first)
    worker.registry.counter("c").increment(1)
    first.publication(worker.publication())
    assert values(first, "c") == [6]
    crash(first)
    second, reader = make_handler(), Worker()
    second.restore()
    assert second.awaited == {worker.identity}
    assert second.answer(reader.read()) is None
    assert decode(second.answer(encode(Attach(1, processes.host_id(), ())))).status == "ok"
    second.publication(worker.publication())
    assert second.awaited == set()
    assert decode(answered(second, reader.read())).status == "ok"
    assert values(second, "c") == [6]


def test_a_new_worker_is_awaited_too(make_handler):
    """Its counts may have been read before it was in the journal."""
    old, new, first = Worker(), Worker(), make_handler()
    first.publication(old.publication())
    write(first)
    first.publication(new.publication())
    second = successor(first, make_handler)
    assert second.awaited == {old.identity, new.identity}


def test_a_worker_that_died_with_the_aggregator_has_the_counts_of_the_journal(make_handler):
    """The successor does not wait for a dead worker, and retires it."""
    worker, first = Worker(process=DEAD_PROCESS), make_handler()
    worker.registry.counter("c").increment(5)
    worker.registry.gauge("g").set(5)
    first.publication(worker.publication())
    write(first)
    second = successor(first, make_handler)
    second.reap_workers(monotonic())
    assert (second.awaited, values(second, "c", "g")) == (set(), [5, None])
    second.reap_workers(monotonic() + 3)
    assert values(second, "c") == [5]


def test_an_aggregator_makes_room_for_a_newer_version_only(make_handler):
    """It refuses if no worker could start another one."""
    for lease, version, status in (
        (Lifetime.joined(forks.this_process()), VERSION + 1, "ok"),
        (Lifetime.joined(forks.this_process()), VERSION, "error"),
        (Lifetime.joined(forks.this_process()), VERSION - 1, "error"),
        (Lifetime(forks.this_process()), VERSION + 1, "error"),
    ):
        keeper, worker = make_handler(lease), Worker()
        worker.registry.counter("c").increment(2)
        keeper.answer(worker.goodbye())
        question = of_version(version, HandOver(1, version))
        assert (decode(keeper.answer(question)).status, keeper.hands_over) == (status, status == "ok")
        crash(keeper)
        if status == "ok":
            newer = make_handler()
            newer.restore()
            assert values(newer, "c") == [2]
            newer.journal.remove()
        keeper.journal.remove()


def test_a_worker_of_the_release_before_is_answered(make_handler, monkeypatch):
    """Its publications count, and its requests are answered."""
    keeper, worker = make_handler(), Worker()
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


def test_a_worker_of_another_pid_namespace_is_dead_when_its_heartbeat_times_out(make_handler):
    """Its gauges go, and return with its next update; its counts stay."""
    keeper, worker = make_handler(), Worker(host="elsewhere")
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
