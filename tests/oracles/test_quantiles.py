"""Quantiles against sorted data, and both views against every value with its weight."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tapes.sketch import EMPTY, Sketch

STREAMS = {
    "log-normal": lambda rng: rng.lognormvariate(-4.6, 1.6),
    "pareto": lambda rng: rng.paretovariate(1.2),
    "bimodal": lambda rng: rng.gauss(0.01, 0.001) if rng.random() < 0.7 else rng.gauss(2.0, 0.1),
    "uniform": lambda rng: rng.uniform(1.0, 100.0),
    "cauchy": lambda rng: math.tan(math.pi * (rng.random() - 0.5)),
    "twelve decades": lambda rng: 10.0 ** rng.uniform(-6, 6),
}
QUANTILES = [0.001, 0.01, 0.25, 0.5, 0.75, 0.95, 0.98, 0.99, 0.999]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("parts", [1, 8])
def test_quantiles_are_within_four_per_mille(stream, parts):
    """Nearest rank, single and merged over eight sketches."""
    rng = random.Random(20_261_122)
    values = [STREAMS[stream](rng) for _ in range(20_000)]
    merged = Sketch.merge(EMPTY.fold(values[part::parts], 0) for part in range(parts))
    ordered = sorted(values)
    for view in (merged.lifetime, merged.recent):
        for q in QUANTILES:
            exact = ordered[max(1, math.ceil(q * len(ordered) - 1e-6)) - 1]
            assert view.quantile(q) == pytest.approx(exact, rel=0.004)
    assert merged.lifetime.sum == math.fsum(values)
    for view in (merged.lifetime, merged.recent):
        assert (view.min, view.max) == (view.quantile(0.0), view.quantile(1.0)) == (ordered[0], ordered[-1])


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("parts", [1, 3])
def test_views_are_those_of_every_value_with_its_weight(stream, parts):
    """Counts, sums, means, deviations and quantiles of 200 s, folded and settled at odd times, and merged."""
    rng = random.Random(20_261_123)
    sketches, events = [EMPTY] * parts, []
    for turn, tick in enumerate(sorted(rng.choices(range(40), k=150))):
        values = [STREAMS[stream](rng) for _ in range(rng.randint(1, 30))]
        sketch = sketches[turn % parts].fold(values, tick)
        sketches[turn % parts] = sketch if turn % 4 else sketch.compacted()
        events += [(value, tick) for value in values]
    events.sort()
    merged = Sketch.merge(sketches)
    assert merged.tick == max(tick for _, tick in events)
    decayed = [math.exp(-0.015 * 5 * (merged.tick - tick)) for _, tick in events]
    for view, weights in ((merged.lifetime, [1] * len(events)), (merged.recent, decayed)):
        count = sum(weights)
        products = [weight * value for weight, (value, _) in zip(weights, events)]
        mean, error = math.fsum(products) / count, 1e-12 * math.fsum(map(abs, products)) / count
        square = math.fsum(weight * value**2 for weight, (value, _) in zip(weights, events)) / count
        assert view.count == pytest.approx(count, rel=1e-12)
        assert view.sum == pytest.approx(mean * count, abs=error * count)
        assert view.mean == pytest.approx(mean, abs=error)
        assert view.stddev == pytest.approx(math.sqrt(square - mean**2), abs=0.004 * math.sqrt(square))
        cumulative = list(itertools.accumulate(weights))
        for q in QUANTILES:
            exact = next(value for (value, _), upto in zip(events, cumulative) if upto >= q * cumulative[-1])
            assert view.quantile(q) == pytest.approx(exact, rel=0.004)
