"""Quantiles against sorted data."""

from __future__ import annotations

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
    assert (merged.lifetime.min, merged.lifetime.max) == (ordered[0], ordered[-1])
