"""tapes.distributed.aggregator.ledger: replacing, merging, leaving."""

from __future__ import annotations

import itertools
import sys

import pytest

import tapes
from tapes.distributed.aggregator.entries import Source
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol.messages import Item, Update
from tapes.processes import Process
from tapes.testing import ManualClock


class Worker:
    """A registry whose updates a test delivers by hand."""

    numbers = itertools.count(1)

    def __init__(self, clock=None, started=0):
        self.process = Process(1, started)
        self.registry = tapes.Registry(clock=clock or ManualClock(1000.0), max_series=3000)
        self.identity = next(self.numbers).to_bytes(16, "little")
        self.seq = 0

    def update(self, base=0, only=None):
        self.seq += 1
        items = [Item(*s) for s in self.registry.collect() if only is None or s[1] in only]
        return Update(
            self.identity,
            self.process,
            "h",
            self.seq,
            base,
            items,
            self.registry.descriptions(),
            max_series=2000,
        )


def value(ledger, name="c", **labels):
    series = ledger.snapshot(200).get(name, **labels)
    return None if series is None else series.value


def test_a_repeated_or_late_update_changes_nothing():
    """The newest state of a series stands, whatever the order of arrival."""
    ledger, worker = Ledger(), Worker()
    updates = []
    for _ in range(5):
        worker.registry.counter("c").increment()
        updates.append(worker.update())
    for update in (updates[2], updates[0], updates[4], updates[4], updates[1], updates[3]):
        ledger.apply(update)
    assert value(ledger) == 5


def test_an_overtaken_update_still_brings_the_series_that_only_it_has():
    """Numbers are compared per series, not per worker."""
    ledger, worker = Ledger(), Worker()
    worker.registry.counter("a").increment()
    worker.registry.counter("b").increment()
    ledger.apply(worker.update())
    worker.registry.counter("a").increment()
    late = worker.update(base=1, only={"a"})
    worker.registry.counter("b").increment()
    ledger.apply(worker.update(base=2, only={"b"}))
    ledger.apply(late)
    assert (value(ledger, "a"), value(ledger, "b")) == (2, 2)


def test_an_update_that_continues_an_unknown_one_is_not_complete():
    """So that a reader is asked for a keyframe instead of being given half of its own events."""
    ledger, worker = Ledger(), Worker()
    worker.registry.counter("a").increment()
    worker.update()
    assert ledger.apply(worker.update(base=1, only=set()))[0] is False
    assert ledger.apply(worker.update())[0] is True
    assert ledger.apply(worker.update(base=3, only=set()))[0] is True


def test_workers_are_added_up_and_survive_their_leaving():
    """An exited worker is counted once, and its late updates change nothing."""
    ledger, one, two = Ledger(), Worker(), Worker()
    for worker, n in ((one, 3), (two, 4)):
        worker.registry.counter("c").increment(n)
        worker.registry.gauge("g").set(n)
        ledger.apply(worker.update())
    assert (value(ledger), value(ledger, "g")) == (7, 7)
    ledger.retire(one.identity)
    ledger.retire(one.identity)
    one.registry.counter("c").increment(100)
    ledger.apply(one.update())
    assert (value(ledger), value(ledger, "g")) == (7, 4)
    assert [worker.identity for worker in ledger.workers] == [two.identity]


def test_memory_depends_on_series_not_on_workers_that_lived():
    """A thousand workers later there is one total per series."""
    ledger = Ledger()
    for _ in range(1000):
        worker = Worker()
        worker.registry.counter("c", l="x").increment()
        ledger.apply(worker.update())
        ledger.retire(worker.identity)
    assert value(ledger, l="x") == 1000
    assert len(ledger._entries) == 1
    assert ledger.workers == []


@pytest.mark.parametrize(("mode", "expected"), [("sum", 9), ("max", 4), ("min", 2), ("mean", 3), ("last", 3)])
def test_gauges_merge_as_their_mode_says(mode, expected):
    """Over workers that have set them; one that never did is no minimum."""
    clock = ManualClock(1000.0)
    ledger = Ledger()
    silent = Worker(clock)
    silent.registry.gauge("g", merge=mode)
    ledger.apply(silent.update())
    for n in (4, 2, 3):
        worker = Worker(clock)
        worker.registry.gauge("g", merge=mode).set(n)
        clock.advance(1)
        ledger.apply(worker.update())
    assert value(ledger, "g") == expected


def test_each_worker_keeps_its_own_gauge_on_request():
    """With merge="each" each worker has a series of its own, labelled by its pid."""
    ledger, worker = Ledger(), Worker()
    worker.registry.gauge("g", merge="each").set(5)
    ledger.apply(worker.update())
    assert value(ledger, "g", worker=1) == 5
    ledger.retire(worker.identity)
    assert ledger.snapshot(200).series("g") == ()


def test_workers_of_one_process_have_different_names():
    """Two registries of one pid are two workers, and a user's label of that name gives way."""
    ledger, one, two = Ledger(), Worker(), Worker()
    for number, worker in enumerate((one, two)):
        worker.registry.gauge("g", merge="each", worker="mine").set(number)
        ledger.apply(worker.update())
    names = [dict(series.labels)["worker"] for series in ledger.snapshot(200).series("g")]
    assert len(set(names)) == 2
    assert all(name.startswith("1-") for name in names)


def test_gauges_of_the_largest_numbers_add_up_to_a_number():
    """Two of 1e308 do not take the read down."""
    ledger = Ledger()
    for mode in ("sum", "mean"):
        for _ in range(2):
            worker = Worker()
            worker.registry.gauge(mode, merge=mode).set(1.5e308)
            ledger.apply(worker.update())
    assert value(ledger, "sum") == sys.float_info.max
    assert value(ledger, "mean") <= 1.5e308


def test_a_name_that_hides_another_workers_field_is_left_out_of_the_tree(caplog):
    """Of a and a.value, of two workers, both are exposed and one is in the tree; a warning names it."""
    ledger, one, two = Ledger(), Worker(), Worker()
    one.registry.counter("a").increment(3)
    two.registry.counter("a.value").increment(4)
    ledger.apply(one.update())
    ledger.apply(two.update())
    snapshot = ledger.snapshot(200)
    assert snapshot.stats() == {"a": {"value": 3}}
    assert (snapshot.get("a").value, snapshot.get("a.value").value) == (3, 4)
    assert "a.value" in caplog.text


def test_where_kinds_differ_the_worker_that_started_last_is_right():
    """In any order of updates; the rest of an update counts, and each worker is refused once."""
    for newest_first in (False, True):
        ledger, old, new, newest = Ledger(), Worker(started=10), Worker(started=20), Worker(started=30)
        old.registry.counter("c").increment()
        old.registry.counter("d").increment(2)
        new.registry.meter("c").mark(5)
        newest.registry.meter("c").mark(7)
        refused = [
            (worker, name)
            for worker in ((newest, new, old, old) if newest_first else (old, new, newest, old, old))
            for name in ledger.apply(worker.update())[1]
        ]
        assert [name for _, name in refused] == (["c"] if newest_first else ["c", "c"])
        snapshot = ledger.snapshot(200)
        assert (snapshot.get("c").count, snapshot.get("d").value) == (12, 2)
        for worker in (old, new, newest):
            ledger.retire(worker.identity)
        assert ledger.snapshot(200).get("c").count == 12


def test_a_newer_kind_replaces_also_what_had_left():
    """What was counted as the former kind can't be added to it."""
    ledger, old, new = Ledger(), Worker(started=10), Worker(started=20)
    old.registry.counter("c").increment(3)
    ledger.apply(old.update())
    ledger.retire(old.identity)
    new.registry.histogram("c").update(5)
    assert ledger.apply(new.update()) == (True, ["c"])
    assert ledger.snapshot(200).get("c").count == 1


def test_where_merge_modes_differ_the_worker_that_started_last_is_right():
    """And the values of the others are merged in its way."""
    for order in itertools.permutations(range(3)):
        ledger = Ledger()
        workers = [Worker(started=started) for started in (10, 20, 30)]
        for worker, mode, worth in zip(workers, ("sum", "max", "min"), (5, 7, 9)):
            worker.registry.gauge("g", merge=mode).set(worth)
        refused = [name for which in order for name in ledger.apply(workers[which].update())[1]]
        assert value(ledger, "g") == 5
        refused += [name for worker in workers for name in ledger.apply(worker.update())[1]]
        assert refused == ["g", "g"]
        workers[0].registry.gauge("g").set(3)
        ledger.apply(workers[0].update())
        assert (value(ledger, "g"), ledger.apply(workers[0].update())) == (3, (True, []))


def test_where_descriptions_differ_the_worker_that_started_last_is_right():
    """Such as in the buckets for Prometheus."""
    for order in itertools.permutations(range(2)):
        ledger, workers = Ledger(), [Worker(started=started) for started in (10, 20)]
        for worker, text in zip(workers, ("old", "new")):
            worker.registry.describe("c", text)
            worker.registry.counter("c").increment()
        for which in order:
            ledger.apply(workers[which].update())
        assert ledger.merged(200).descriptions["c"].text == "new"


def test_rates_and_quantiles_of_many_are_those_of_one_that_saw_all():
    """With workers that start late and leave early."""
    clock = ManualClock(1000.0)
    one, ledger, workers = tapes.Registry(clock=clock), Ledger(), []
    one.timer("t")
    for turn in range(60):
        if turn % 7 == 0:
            workers.append(Worker(clock))
        if turn % 11 == 10:
            gone = workers.pop(0)
            ledger.apply(gone.update())
            ledger.retire(gone.identity)
        for number, worker in enumerate(workers):
            seconds = 0.001 * (1 + (turn * 7 + number) % 90)
            worker.registry.timer("t").update(seconds)
            one.timer("t").update(seconds)
        clock.advance(3)
    for worker in workers:
        ledger.apply(worker.update())
    merged, alone = ledger.snapshot(int(clock() // 5)).get("t"), one.snapshot().get("t")
    assert merged.lifetime.bins() == alone.lifetime.bins()
    assert (merged.count, merged.sum) == (alone.count, alone.sum)
    for field, expected in alone.fields().items():
        assert merged.fields()[field] == pytest.approx(expected, rel=1e-9)


def update_with(child, ancestor, seq):
    """Return an update of a child with the record of an ancestor."""
    record = ancestor.update()._replace(seq=seq, descriptions={})
    return child.update()._replace(ancestors=(record,))


def test_an_ancestor_counts_once_in_the_updates_of_several_children():
    """The newest record of an ancestor counts, also the one that it sends itself; gauges as well."""
    ledger, parent, one, two = Ledger(), Worker(), Worker(), Worker()
    parent.registry.counter("c").increment(7)
    parent.registry.gauge("g").set(5)
    early = update_with(one, parent, 100)
    parent.registry.counter("c").increment(3)
    late = update_with(two, parent, 200)
    ledger.apply(late)
    ledger.apply(early)
    assert (value(ledger), value(ledger, "g")) == (10, 5)
    assert ledger.ancestors() == {parent.identity}
    assert ledger.living == 2
    parent.registry.counter("c").increment(90)
    parent.seq = 300
    ledger.apply(parent.update())
    assert (value(ledger), ledger.living) == (100, 3)
    ledger.apply(update_with(one, parent, 150))
    assert value(ledger) == 100


def test_a_dead_ancestor_is_replaceable_while_a_live_worker_descends_from_it():
    """Its gauges stay as long; then it is one of the retired."""
    ledger, parent, child = Ledger(), Worker(), Worker()
    parent.registry.gauge("g").set(5)
    parent.registry.counter("c").increment(7)
    ledger.apply(update_with(child, parent, 100))
    ledger.mark_dead(child.identity)
    assert ledger.ancestors() == set()
    ledger.mark_dead(parent.identity)
    assert (value(ledger), value(ledger, "g")) == (7, None)
    grandchild = Worker()
    ledger.apply(update_with(grandchild, parent, 200))
    assert value(ledger, "g") == 5
    for worker in (child, parent, grandchild):
        ledger.retire(worker.identity)
    ledger.apply(update_with(Worker(), parent, 300))
    assert (value(ledger), value(ledger, "g"), ledger.retired) == (7, None, 2)


def test_label_sets_beyond_the_limit_are_added_up_and_places_come_free():
    """In one series, apart for each worker; gauges that leave make room."""
    ledger, one, two = Ledger(), Worker(), Worker()
    for worker in (one, two):
        for label in range(1500):
            worker.registry.counter("c", w=worker.identity.hex(), l=label).increment()
            worker.registry.gauge("g", w=worker.identity.hex(), l=label).set(1)
        ledger.apply(worker.update())
        ledger.apply(worker.update())
    snapshot = ledger.snapshot(200)
    assert len(snapshot.series("c")) == len(snapshot.series("g")) == 2001
    assert snapshot.get("c", overflow="true").value == 1000
    ledger.retire(one.identity)
    snapshot = ledger.snapshot(200)
    assert sum(series.value for series in snapshot.series("c")) == 3000
    assert sum(series.value for series in snapshot.series("g")) == 1500
    three = Worker()
    for label in range(1000):
        three.registry.gauge("g", w="3", l=label).set(1)
    ledger.apply(three.update())
    ledger.retire(two.identity)
    ledger.retire(three.identity)
    assert ledger.snapshot(200).series("g") == ()
    assert ledger.slots.sizes["g"] == 0


def test_each_shows_publishing_workers_within_the_limit():
    """Not an ancestor; a worker's overflowing gauges are added up."""
    ledger, parent, child = Ledger(), Worker(), Worker()
    parent.registry.gauge("g", merge="each").set(7)
    for label in range(2002):
        child.registry.gauge("h", merge="each", label=label).set(1)
    ledger.apply(update_with(child, parent, 100))
    snapshot = ledger.snapshot(200)
    assert snapshot.series("g") == ()
    assert len(snapshot.series("h")) == 2001
    assert snapshot.get("h", overflow="true", worker="1").value == 2


def new_to(ledger, name="c"):
    """How much of a count no earlier aggregator had."""
    (state,) = ledger.snapshot(200).family(name).states
    return state.counted - state.origin.baseline


def test_the_baselines_of_all_workers_add_up():
    """Of those that live, and of those that have left since."""
    ledger, workers = Ledger(), [Worker() for _ in range(3)]
    for worker in workers:
        counter = worker.registry.counter("c")
        counter.increment(10)
        counter.decrement(2)
        counter.note_baseline(counter.collect())
        worker.registry.meter("m").mark(3)
        counter.increment(1)
        ledger.apply(worker.update())
    assert (value(ledger), new_to(ledger)) == (27, 3)
    ledger.retire(workers[0].identity)
    workers[1].registry.counter("c").increment(5)
    ledger.apply(workers[1].update(base=1))
    assert (value(ledger), new_to(ledger)) == (32, 8)
    assert ledger.snapshot(200).family("m").states[0].origin.baseline == 0


def test_a_read_that_comes_first_makes_no_count_new():
    """A read may come before a worker notices another aggregator; the first publication has the baseline."""
    ledger, worker = Ledger(), Worker()
    counter = worker.registry.counter("c")
    counter.increment(10)
    before = counter.collect()
    counter.increment(1)
    asked = worker.update()
    ledger.apply(asked, source=Source.READ)
    assert (value(ledger), new_to(ledger)) == (11, 0)
    counter.note_baseline(before)
    overtaken = worker.update()._replace(seq=asked.seq)
    ledger.apply(overtaken)
    assert (value(ledger), new_to(ledger)) == (11, 1)
    counter.increment(1)
    ledger.apply(worker.update(base=1), source=Source.READ)
    assert (value(ledger), new_to(ledger)) == (12, 2)


def test_a_broken_connection_changes_no_baseline():
    """A worker can't know that it is the same aggregator; that does."""
    ledger, worker = Ledger(), Worker()
    counter = worker.registry.counter("c")
    counter.increment(10)
    ledger.apply(worker.update())
    counter.note_baseline(counter.collect())
    counter.increment(1)
    ledger.apply(worker.update())
    assert (value(ledger), new_to(ledger)) == (11, 11)


def test_the_baseline_of_an_ancestor_is_its_descendants_until_it_publishes():
    """The first descendant's baseline of an ancestor counts, until the ancestor sends its own."""
    ledger, parent, one, two = Ledger(), Worker(), Worker(), Worker()
    counter = parent.registry.counter("c")
    counter.increment(10)
    ledger.apply(update_with(one, parent, 100))
    assert (value(ledger), new_to(ledger)) == (10, 10)
    counter.note_baseline(counter.collect())
    counter.increment(1)
    ledger.apply(update_with(two, parent, 200))
    assert (value(ledger), new_to(ledger)) == (11, 11)
    counter.increment(1)
    ledger.apply(parent.update()._replace(seq=300))
    assert (value(ledger), new_to(ledger)) == (12, 2)
