"""Whatever is done in whatever order, what was recorded is what is read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tapes
from tapes.metrics import KINDS
from tapes.metrics.folding import FULL
from tapes.testing import ManualClock

amounts = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6, allow_subnormal=False))
values = st.one_of(
    st.floats(-1e30, 1e30, allow_nan=False),
    st.integers(-1000, 1000),
    st.floats(1e-6, 10.0, allow_subnormal=False),
)
NAMES = ("counter", "meter", "histogram", "timer")


class Service(RuleBasedStateMachine):
    """Workers that record, fold, are read, and leave; a model that keeps a plain list of everything."""

    @initialize()
    def start(self):
        self.clock = ManualClock(500.0)
        self.workers = []
        self.retired = {kind: [] for kind in NAMES}
        self.up, self.down, self.marked = [], [], []
        self.updated = {"histogram": [], "timer": []}
        self.join()

    @rule()
    def join(self):
        self.workers.append(tapes.Registry(clock=self.clock))

    @rule(seconds=st.sampled_from([0.0, 0.3, 4.9, 5.0, 61.0, 4000.0]))
    def wait(self, seconds):
        self.clock.advance(seconds)

    def worker(self, number):
        return self.workers[number % len(self.workers)]

    @rule(number=st.integers(0, 9), amount=amounts)
    def increment(self, number, amount):
        self.worker(number).counter("counter").increment(amount)
        self.up.append(amount)

    @rule(number=st.integers(0, 9), amount=amounts)
    def decrement(self, number, amount):
        self.worker(number).counter("counter").decrement(amount)
        self.down.append(amount)

    @rule(number=st.integers(0, 9), amount=amounts)
    def mark(self, number, amount):
        self.worker(number).meter("meter").mark(amount)
        self.marked.append(amount)

    @rule(number=st.integers(0, 9), value=values, times=st.sampled_from([1, 2, FULL - 1, FULL, 1100, 5000]))
    def update(self, number, value, times):
        for _ in range(times):
            self.worker(number).histogram("histogram").update(value)
            self.worker(number).timer("timer").update(abs(value))
        self.updated["histogram"] += [value] * times
        self.updated["timer"] += [abs(value)] * times

    @rule(number=st.integers(0, 9))
    def read(self, number):
        self.worker(number).snapshot()

    @precondition(lambda self: len(self.workers) > 1)
    @rule(number=st.integers(0, 9))
    def leave(self, number):
        leaving = self.workers.pop(number % len(self.workers))
        for kind, _, _, state in leaving.lineage.drain():
            self.retired[kind] = [KINDS[kind].merge([*self.retired[kind], state])]
        assert all(series.fields()["count" if "count" in series.fields() else "value"] == 0
                   for family in leaving.snapshot() for series in family.series)  # fmt: skip

    def merged(self, kind):
        states = list(self.retired[kind])
        for worker in self.workers:
            states += [state for one, _, _, state in worker.collect() if one == kind]
        return KINDS[kind].merge(states).series((), int(self.clock() // 5)) if states else None

    @invariant()
    def nothing_is_lost_or_made_up(self):
        counter, meter = self.merged("counter"), self.merged("meter")
        if counter is not None:
            assert counter.total == math.fsum(self.up)
            assert counter.value == math.fsum([*self.up, *(-amount for amount in self.down)])
        if meter is not None:
            assert meter.count == math.fsum(self.marked)
            assert all(rate >= 0 for rate in (meter.m1, meter.m5, meter.m15))
        for kind, recorded in self.updated.items():
            series = self.merged(kind)
            if series is None:
                continue
            assert series.count == len(recorded) == sum(weight for _, weight in series.lifetime.bins())
            assert series.sum == math.fsum(recorded)
            if recorded:
                assert (series.lifetime.min, series.lifetime.max) == (min(recorded), max(recorded))
                ordered = sorted(recorded)
                median = ordered[math.ceil(len(ordered) / 2) - 1]
                assert series.lifetime.quantile(0.5) == pytest.approx(median, rel=0.004, abs=1e-38)
                assert series.lifetime.min <= series.recent.min <= series.recent.max <= series.lifetime.max


TestService = Service.TestCase
TestService.settings = settings(max_examples=60, stateful_step_count=30)


ticks = st.integers(0, 60)
lives = st.lists(st.tuples(ticks, ticks), min_size=1, max_size=6)
bursts = st.lists(st.tuples(st.integers(0, 5), ticks, st.floats(0, 4.99), st.integers(1, 500)), max_size=40)


@given(lives, bursts, st.lists(ticks, max_size=3))
def test_rates_of_workers_that_come_and_go_are_those_of_one_meter(lives, bursts, reads):
    """Staggered starts, deaths, recycling, bursts, reads between: to 1e-12 the rates of the merged stream."""
    lives = [(min(life), max(life)) for life in lives]
    born = min(start for start, _ in lives)
    moments = sorted(
        [(start * 5.0, 0, worker, 0) for worker, (start, _) in enumerate(lives)]
        + [(tick * 5.0 + offset, 1, worker % len(lives), count) for worker, tick, offset, count in bursts]
        + [(tick * 5.0, 2, 0, 0) for tick in reads]
        + [(end * 5.0 + 4.999, 3, worker, 0) for worker, (_, end) in enumerate(lives)]
    )
    clock = ManualClock()
    one = None
    workers, retired = {}, []
    marked = 0
    for moment, what, worker, count in moments:
        clock.advance(max(0.0, moment - clock()))
        if one is None and moment >= born * 5.0:
            one = tapes.Registry(clock=clock).meter("m")
        if what == 0:
            workers[worker] = tapes.Registry(clock=clock).meter("m")
        elif what == 1 and worker in workers:
            workers[worker].mark(count)
            one.mark(count)
            marked += count
        elif what == 2 and workers:
            [meter.collect() for meter in workers.values()]
        elif what == 3 and worker in workers:
            retired = [KINDS["meter"].merge([*retired, workers.pop(worker).collect()])]
    for later in (0.0, 5.0, 300.0):
        clock.advance(later)
        tick = int(clock() // 5)
        states = [*retired, *(meter.collect() for meter in workers.values())]
        merged = KINDS["meter"].merge(states).series((), tick)
        alone = one.collect().series((), tick)
        assert merged.count == alone.count == marked
        assert (merged.m1, merged.m5, merged.m15) == pytest.approx(
            (alone.m1, alone.m5, alone.m15), rel=1e-12, abs=1e-12
        )
