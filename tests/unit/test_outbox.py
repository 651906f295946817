"""What a worker tells: all that is new, whoever folded it, and nothing of what is not."""

from __future__ import annotations

import random
import sys
import threading

import pytest

import tapes
from tapes.distributed.worker.outbox import DURATION, Outbox
from tapes.metrics.folding import FULL
from tapes.registry import REJECTED


class Told:
    """Who hears what an outbox publishes, and sometimes does not."""

    def __init__(self, registry):
        self.outbox = Outbox(registry)
        self.hears = True
        self.heard = 0
        self.names = []
        self._known = {}

    def publish(self, **options):
        self.names = []
        self.outbox.publish(self._hear, **options)
        return [name for name in self.names if name != DURATION]

    def _hear(self, update):
        if not self.hears:
            return False
        self.heard += 1
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
def told(registry):
    return Told(registry)


def test_only_what_is_new_is_told(registry, told):
    """A series that nobody touched is not told again."""
    for name in "ab":
        registry.counter(name).increment()
    assert sorted(told.publish()) == ["a", "b"]
    assert told.publish() == []
    registry.counter("b").increment()
    assert told.publish() == ["b"]
    assert told.values() == {"a": 1, "b": 2}


def test_what_others_have_folded_is_told(registry, told):
    """By who fills a buffer, or reads: nothing waits then, and it is new all the same."""
    counter, timer = registry.counter("c"), registry.timer("t")
    told.publish()
    for _ in range(FULL):
        counter.increment()
    timer.update(0.5)
    timer.collect()
    assert not counter._buffer
    assert not timer._buffer
    assert sorted(told.publish()) == ["c", "t"]
    assert told.publish() == []


def test_what_nobody_heard_is_told_again(registry, told):
    """It is not let go before somebody has it; reading tells it too, and changes nothing in that."""
    counter = registry.counter("c")
    told.publish()
    counter.increment(3)
    told.hears = False
    assert told.publish() == []
    for _ in range(2):
        assert "c" in [item.name for item in told.outbox.update().items]
    told.hears = True
    assert told.publish() == ["c"]
    assert told.values() == {"c": 3}


def test_what_happens_while_it_is_sent_is_told_next(registry, told):
    """Even if it is folded before the outbox notes what it told."""
    counter = registry.counter("c")
    told.publish()
    counter.increment()
    hear = told._hear

    def busy(update):
        counter.increment(10)
        counter.collect()
        return hear(update)

    told.outbox.publish(busy)
    assert told.values() == {"c": 1}
    assert told.publish() == ["c"]
    assert told.values() == {"c": 11}


def test_a_gauge_is_told_when_it_is_set(registry, told):
    """Setting needs no buffer."""
    gauge = registry.gauge("g")
    gauge.set(1)
    assert told.publish() == ["g"]
    assert told.publish() == []
    gauge.set(2)
    assert told.publish() == ["g"]
    assert told.values() == {"g": 2}


def test_a_gauge_that_got_a_producer_is_told_when_that_was_asked(registry, told):
    """Whatever it was set to before, and moved by: not again and again."""
    gauge = registry.gauge("g")
    gauge.set(1)
    gauge.increment()
    told.publish()
    gauge.increment()
    registry.gauge("g", lambda: 7)
    registry.refresh()
    assert told.publish() == ["g"]
    heard = told.heard
    told.publish()
    assert told.heard == heard
    assert told.values() == {"g": 7}


def test_a_read_carries_the_bad_values_that_it_has_found(registry, told):
    """They are found by folding for it: the first makes a series, and the next one adds to that."""
    for bad in (1, 2):
        registry.counter("c").increment(float("nan"))
        (rejected,) = [item for item in told.outbox.update().items if item.name == REJECTED]
        assert rejected.state.counted == bad
        told.publish()


def test_a_removed_series_is_not_told_any_more(registry, told):
    """Who still holds it may record on; one of the same name is another one."""
    before = registry.counter("c")
    before.increment()
    told.publish()
    registry.remove("c")
    told.publish()
    before.increment()
    before.collect()
    assert "c" not in told.values()
    registry.counter("c").increment(5)
    assert told.publish() == ["c"]
    assert told.values() == {"c": 5}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_in_between_all_is_told(registry, told, seed):
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
                lambda: told.outbox.update(),
                lambda: told.outbox.reset_baselines(),
            ],
            [10, 3, 1, 3, 1],
        )[0]()
        told.hears = rng.random() < 0.7
        if rng.random() < 0.5:
            told.publish(keyframe=rng.random() < 0.1)
            if told.hears:
                assert {name: value for name, value in told.values().items() if value} == counted


def test_threads_that_record_meanwhile_are_told_of_exactly(registry, told):
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
            told.publish()
    finally:
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    told.publish()
    assert told.values() == {counter.name: rounds * FULL for counter in counters}
