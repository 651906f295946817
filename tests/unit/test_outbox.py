"""tapes.distributed.worker.outbox: a worker publishes everything that changed, and nothing else."""

from __future__ import annotations

import random
import sys
import threading

import pytest

import tapes
from tapes.distributed.worker.outbox import DURATION, Outbox
from tapes.metrics.folding import FULL
from tapes.registry import REJECTED


class Subscriber:
    """An aggregator that an outbox publishes to, and that sometimes can't be reached."""

    def __init__(self, registry):
        self.outbox = Outbox(registry)
        self.is_there = True
        self.received = 0
        self.names = []
        self._known = {}

    def publish(self, **options):
        self.names = []
        self.outbox.publish(self._receive, **options)
        return [name for name in self.names if name != DURATION]

    def _receive(self, update):
        if not self.is_there:
            return False
        self.received += 1
        if not update.base:
            self._known = {}
        self.names = [item.name for item in update.items]
        self._known.update({item.name: item.state for item in update.items})
        return True

    def values(self):
        return {
            name: state.value if hasattr(state, "mode") else state.counted
            for name, state in self._known.items()
            if not name.startswith("tapes.")
        }


@pytest.fixture
def registry():
    return tapes.Registry()


@pytest.fixture
def subscriber(registry):
    return Subscriber(registry)


def test_only_changes_are_published(registry, subscriber):
    """A series that did not change is not published again."""
    for name in "ab":
        registry.counter(name).increment()
    assert sorted(subscriber.publish()) == ["a", "b"]
    assert subscriber.publish() == []
    registry.counter("b").increment()
    assert subscriber.publish() == ["b"]
    assert subscriber.values() == {"a": 1, "b": 2}


def test_values_that_others_folded_are_published(registry, subscriber):
    """A full buffer or a read folds values before the outbox does; they are published all the same."""
    counter, timer = registry.counter("c"), registry.timer("t")
    subscriber.publish()
    for _ in range(FULL):
        counter.increment()
    timer.update(0.5)
    timer.collect()
    assert not counter._buffer
    assert not timer._buffer
    assert sorted(subscriber.publish()) == ["c", "t"]
    assert subscriber.publish() == []


def test_a_change_that_could_not_be_sent_is_published_again(registry, subscriber):
    """A change that could not be sent is published again; a read has it too, and does not change that."""
    counter = registry.counter("c")
    subscriber.publish()
    counter.increment(3)
    subscriber.is_there = False
    assert subscriber.publish() == []
    for _ in range(2):
        assert "c" in [item.name for item in subscriber.outbox.update().items]
    subscriber.is_there = True
    assert subscriber.publish() == ["c"]
    assert subscriber.values() == {"c": 3}


def test_values_recorded_during_a_publication_are_in_the_next_one(registry, subscriber):
    """Values recorded while an update is sent are in the next one, also if they are folded before."""
    counter = registry.counter("c")
    subscriber.publish()
    counter.increment()
    receive = subscriber._receive

    def busy(update):
        counter.increment(10)
        counter.collect()
        return receive(update)

    subscriber.outbox.publish(busy)
    assert subscriber.values() == {"c": 1}
    assert subscriber.publish() == ["c"]
    assert subscriber.values() == {"c": 11}


def test_a_gauge_is_published_when_it_is_set(registry, subscriber):
    """A gauge is published when it is set, although a set is not buffered."""
    gauge = registry.gauge("g")
    gauge.set(1)
    assert subscriber.publish() == ["g"]
    assert subscriber.publish() == []
    gauge.set(2)
    assert subscriber.publish() == ["g"]
    assert subscriber.values() == {"g": 2}


def test_a_gauge_with_a_new_producer_is_published_once_it_has_run(registry, subscriber):
    """Whatever it was set to before, and moved by: not again and again."""
    gauge = registry.gauge("g")
    gauge.set(1)
    gauge.increment()
    subscriber.publish()
    gauge.increment()
    registry.gauge("g", lambda: 7)
    registry.refresh()
    assert subscriber.publish() == ["g"]
    received = subscriber.received
    subscriber.publish()
    assert subscriber.received == received
    assert subscriber.values() == {"g": 7}


def test_a_read_carries_the_bad_values_that_it_has_found(registry, subscriber):
    """They are found by folding for it: the first makes a series, and the next one adds to that."""
    for bad in (1, 2):
        registry.counter("c").increment(float("nan"))
        (rejected,) = [item for item in subscriber.outbox.update().items if item.name == REJECTED]
        assert rejected.state.counted == bad
        subscriber.publish()


def test_a_removed_series_is_not_published_any_more(registry, subscriber):
    """A removed metric may still be recorded into; one of the same name is another metric."""
    before = registry.counter("c")
    before.increment()
    subscriber.publish()
    registry.remove("c")
    subscriber.publish()
    before.increment()
    before.collect()
    assert "c" not in subscriber.values()
    registry.counter("c").increment(5)
    assert subscriber.publish() == ["c"]
    assert subscriber.values() == {"c": 5}


@pytest.mark.parametrize("seed", range(20))
def test_all_changes_are_published_whatever_happens_in_between(registry, subscriber, seed):
    """Recording, folding, reading, failing, making and removing at random, against a count by hand."""
    rng = random.Random(seed)
    counted = {}

    def record(name):
        events = rng.choice([1, 2, FULL - 1, FULL, FULL + 1, 3 * FULL])
        for _ in range(events):
            registry.counter(name).increment()
        counted[name] = counted.get(name, 0) + events

    def remove(name):
        registry.remove(name)
        counted.pop(name, None)

    for _ in range(300):
        name = rng.choice("abcdef")
        rng.choices(
            [
                lambda n=name: record(n),
                lambda n=name: n in counted and registry.counter(n).collect(),
                lambda n=name: remove(n),
                lambda: subscriber.outbox.update(),
                lambda: subscriber.outbox.reset_baselines(),
            ],
            [10, 3, 1, 3, 1],
        )[0]()
        subscriber.is_there = rng.random() < 0.7
        if rng.random() < 0.5:
            subscriber.publish(keyframe=rng.random() < 0.1)
            if subscriber.is_there:
                assert {name: value for name, value in subscriber.values().items() if value} == counted


def test_values_of_threads_are_published_exactly(registry, subscriber):
    """The last publication has everything, however folds and publications met before."""
    counters = [registry.counter(f"c{number}") for number in range(4)]
    rounds = 400
    interval = sys.getswitchinterval()

    def record(counter):
        for _ in range(rounds * FULL):
            counter.increment()

    threads = [threading.Thread(target=record, args=(counter,)) for counter in counters]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            subscriber.publish()
    finally:
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    subscriber.publish()
    assert subscriber.values() == {counter.name: rounds * FULL for counter in counters}
