"""A gauge that merges as ``last``: its newest value stays when the worker that set it has ended."""

from __future__ import annotations

import pytest

from tapes.clock import monotonic
from tapes.distributed.aggregator.ledger import Ledger
from tapes.testing import ManualClock
from tests.unit.handlers import DEAD_PROCESS, crash, successor, values, write
from tests.unit.handlers import Worker as Client
from tests.unit.test_ledger import Worker, update_with, value


def setter(clock, worth, mode="last", name="g", **options):
    """Return a worker that has just set its gauge."""
    clock.advance(1)
    worker = Worker(clock, **options)
    worker.registry.gauge(name, merge=mode).set(worth)
    return worker


def end(ledger, worker, how):
    """End a worker in one of the ways that an aggregator notices."""
    if how == "death":
        ledger.mark_dead(worker.identity)
    ledger.retire(worker.identity)


@pytest.mark.parametrize("how", ["goodbye", "death"])
def test_the_value_that_was_set_last_stays_whoever_exits_first(clock, how):
    """42 is set after 100; it stands while both live, after either has exited, and after both have."""
    for order in ((0, 1), (1, 0)):
        ledger, workers = Ledger(), [setter(clock, 100), setter(clock, 42)]
        for worker in workers:
            ledger.apply(worker.update())
        for which in order:
            end(ledger, workers[which], how)
            assert value(ledger, "g") == 42
        late = setter(clock, 7)
        ledger.apply(late.update())
        assert value(ledger, "g") == 7


@pytest.mark.parametrize(
    ("mode", "expected"), [("sum", 5), ("max", 5), ("min", 5), ("mean", 5), ("last", 9), ("each", 5)]
)
def test_in_every_other_mode_an_exited_worker_contributes_nothing(clock, mode, expected):
    """A worker that set 9 exits, one that set 5 before it lives; then that exits too."""
    ledger, workers = Ledger(), [setter(clock, 5, mode), setter(clock, 9, mode)]
    for worker in workers:
        ledger.apply(worker.update())
    ledger.retire(workers[1].identity)
    assert [series.value for series in ledger.snapshot(200).series("g")] == [expected]
    ledger.retire(workers[0].identity)
    assert [series.value for series in ledger.snapshot(200).series("g")] == ([9] if mode == "last" else [])


def test_messages_that_arrive_after_a_death_still_bring_the_newest_value(clock):
    """A newer value counts, an older update of the same worker does not, and no other mode comes back."""
    ledger, worker = Ledger(), setter(clock, 1)
    worker.registry.gauge("s").set(1)
    early = worker.update()
    ledger.apply(early)
    ledger.mark_dead(worker.identity)
    clock.advance(1)
    worker.registry.gauge("g").set(2)
    worker.registry.gauge("new", merge="last").set(3)
    ledger.apply(worker.update())
    ledger.apply(early)
    found = [value(ledger, name) for name in ("g", "new", "s")]
    ledger.retire(worker.identity)
    assert found == [value(ledger, name) for name in ("g", "new", "s")] == [2, 3, None]


def test_a_late_message_of_a_dead_worker_does_not_supersede_a_newer_value(clock):
    """Values are in the order in which they were set, not in which they arrive."""
    ledger, old, new = Ledger(), setter(clock, 1), setter(clock, 2)
    ledger.apply(new.update())
    ledger.retire(new.identity)
    ledger.apply(old.update())
    ledger.mark_dead(old.identity)
    ledger.apply(old.update())
    ledger.retire(old.identity)
    assert value(ledger, "g") == 2


def test_a_gauge_that_was_only_made_or_whose_producer_failed_hides_no_value(clock):
    """The next worker makes the gauge and has not set it; another one's producer fails; both exit."""
    ledger, first = Ledger(), setter(clock, 42)
    made, fails, produced = (Worker(clock) for _ in range(3))
    made.registry.gauge("g", merge="last")
    fails.registry.gauge("g", lambda: 1 / 0, merge="last")
    fails.registry.refresh()
    for worker in (first, made, fails):
        ledger.apply(worker.update())
        ledger.retire(worker.identity)
        assert value(ledger, "g") == 42
    clock.advance(1)
    produced.registry.gauge("g", lambda: 7, merge="last")
    produced.registry.refresh()
    ledger.apply(produced.update())
    ledger.retire(produced.identity)
    assert value(ledger, "g") == 7


def test_a_series_that_a_live_worker_removes_takes_its_value_along(clock):
    """Not by that worker's exit either; a value that another worker left stays."""
    for gone_before in (False, True):
        ledger, gone, worker = Ledger(), setter(clock, 1), setter(clock, 2)
        if gone_before:
            ledger.apply(gone.update())
            ledger.retire(gone.identity)
        ledger.apply(worker.update())
        worker.registry.remove("g")
        ledger.apply(worker.update())
        ledger.mark_dead(worker.identity)
        ledger.apply(worker.update())
        ledger.retire(worker.identity)
        assert value(ledger, "g") == (1 if gone_before else None)


def test_a_worker_that_was_only_silent_has_its_value_once(clock):
    """It counts as dead for a while, comes back, and removes the series: nothing is left of it."""
    ledger, worker = Ledger(), setter(clock, 2)
    ledger.apply(worker.update())
    ledger.mark_dead(worker.identity)
    assert value(ledger, "g") == 2
    ledger.mark_alive(worker.identity)
    worker.registry.remove("g")
    ledger.apply(worker.update())
    assert value(ledger, "g") is None


@pytest.mark.parametrize("other_label", [False, True])
@pytest.mark.parametrize("ended", ["retired", "dead", "alive"])
def test_a_newer_worker_that_merges_the_name_in_another_way_ends_it(clock, ended, other_label):
    """A rolling deploy: the value goes, and does not come back when older workers exit or are late."""
    ledger, old, new = Ledger(), setter(clock, 42, started=10), Worker(clock, started=20)
    ledger.apply(old.update())
    if ended == "dead":
        ledger.mark_dead(old.identity)
    elif ended == "retired":
        ledger.retire(old.identity)
    gauge = new.registry.gauge("g", merge="sum", **({"of": "new"} if other_label else {}))
    gauge.set(5)
    ledger.apply(new.update())
    ledger.apply(old.update())
    ledger.mark_dead(old.identity)
    ledger.apply(old.update())
    ledger.retire(old.identity)
    assert [series.value for series in ledger.snapshot(200).series("g")] == [5]
    assert ledger.slots.sizes["g"] == 1
    ledger.retire(new.identity)
    assert ledger.snapshot(200).series("g") == ()
    assert ledger.slots.sizes["g"] == 0


def test_an_older_worker_that_merges_in_another_way_does_not_end_it(clock):
    """The newest worker decides, also after it has exited."""
    ledger, old = Ledger(), setter(clock, 100, "max", started=10)
    old.update()  # a gauge of another mode stands since it was collected
    new = setter(clock, 42, started=20)
    ledger.apply(new.update())
    ledger.retire(new.identity)
    ledger.apply(old.update())
    assert value(ledger, "g") == 42
    ledger.retire(old.identity)
    assert value(ledger, "g") == 42


def test_series_of_one_name_may_merge_in_different_ways(clock):
    """What one series of a name does, does not end the value of another one."""
    ledger, old, new = Ledger(), Worker(clock, started=10), Worker(clock, started=20)
    for worker in (old, new):
        worker.registry.gauge("g", of="a", merge="sum").set(1)
        worker.registry.gauge("g", of="b", merge="last").set(2)
        worker.registry.gauge("g", of="c", merge="last" if worker is old else "max").set(3)
    ledger.apply(old.update())
    ledger.retire(old.identity)
    ledger.apply(new.update())
    ledger.retire(new.identity)
    assert [dict(series.labels) for series in ledger.snapshot(200).series("g")] == [{"of": "b"}]


def test_another_kind_of_the_name_ends_it(clock):
    """A newer worker has a counter of that name."""
    ledger, old, new = Ledger(), setter(clock, 42, started=10), Worker(clock, started=20)
    ledger.apply(old.update())
    ledger.retire(old.identity)
    new.registry.counter("g").increment(3)
    ledger.apply(new.update())
    assert value(ledger, "g") == 3
    ledger.retire(new.identity)
    assert value(ledger, "g") == 3


def test_values_beyond_the_limit_of_label_sets_share_one_series(clock):
    """That is the last of them; places of values that stay are taken, and there are no more of them."""
    ledger, worker = Ledger(), Worker(clock)
    for label in range(2003):
        clock.advance(1)
        worker.registry.gauge("g", merge="last", label=label).set(label)
    ledger.apply(worker.update())
    for ended in (False, True):
        if ended:
            ledger.retire(worker.identity)
        snapshot = ledger.snapshot(200)
        assert len(snapshot.series("g")) == 2001
        assert snapshot.get("g", overflow="true").value == 2002
        assert ledger.slots.sizes["g"] == 2000


def test_what_a_dead_parent_had_set_before_its_children_were_forked_stays(clock):
    """It is known from its children only."""
    ledger, parent, child = Ledger(), setter(clock, 5), Worker(clock)
    ledger.apply(update_with(child, parent, 100))
    for worker in (child, parent):
        ledger.mark_dead(worker.identity)
        ledger.retire(worker.identity)
    assert value(ledger, "g") == 5


def test_memory_depends_on_series_not_on_workers_that_have_set_them(clock):
    """A thousand workers later one value is kept."""
    ledger = Ledger()
    for number in range(1000):
        worker = setter(clock, number)
        ledger.apply(worker.update())
        ledger.retire(worker.identity)
    assert value(ledger, "g") == 999
    assert (len(ledger.accounts), len(ledger._entries)) == (0, 1)


@pytest.mark.parametrize("how", ["journal", "tail", "both", "died together"])
def test_a_successor_knows_the_last_value(make_handler, how):
    """However the worker exited, and whatever of the journal the killed aggregator had come to write."""
    first, worker = make_handler(), Client(process=DEAD_PROCESS if how == "died together" else None)
    worker.registry.gauge("g", merge="last").set(42)
    worker.registry.gauge("s").set(5)
    if how == "died together":
        first.publication(worker.publication())
        write(first)
    else:
        if how == "tail":
            assert first.journal.finish()
        first.answer(worker.goodbye())
    if how == "both":
        write(first)
        first.answer(worker.goodbye())
    elif how == "journal":
        write(first)
    for _ in range(3):
        second = successor(first, make_handler)
        second.reap_workers(monotonic())
        assert values(second, "g", "s") == [42, None]
        second.reap_workers(monotonic() + 3)
        assert values(second, "g", "s") == [42, None]
        write(second)
        first = second
    other = Client()
    other.registry.gauge("g", merge="last").set(43)
    first.publication(other.publication())
    assert values(first, "g") == [43]


def test_the_newest_worker_decides_after_a_restart_too(make_handler):
    """It merges the name as a sum now: what the journal keeps of it goes."""
    first, old, new = make_handler(), Client(), Client()
    old.registry.gauge("g", merge="last").set(42)
    first.answer(old.goodbye())
    write(first)
    second = successor(first, make_handler)
    new.registry.gauge("g", of="new").set(5)
    second.publication(new.publication())
    assert values(second, "g") == [None]
    write(second)
    crash(second)
    third = make_handler()
    third.restore()
    assert values(third, "g") == [None]


def test_a_value_of_a_silent_worker_stays(make_handler):
    """Its pid means nothing here, so a minute of silence is its end."""
    keeper, worker = make_handler(), Client(host="elsewhere")
    worker.registry.gauge("g", merge="last").set(7)
    worker.registry.gauge("m", merge="max").set(7)
    keeper.publication(worker.publication())
    keeper.reap_workers(1000.0)
    keeper.reap_workers(1061.0)
    assert values(keeper, "g", "m") == [7, None]
    write(keeper)
    second = successor(keeper, make_handler)
    second.reap_workers(1000.0)
    second.reap_workers(1061.0)
    assert values(second, "g", "m") == [7, None]


@pytest.fixture
def clock():
    """A clock on the boundary of a tick."""
    return ManualClock(1000.0)
