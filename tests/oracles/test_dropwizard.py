"""Dropwizard's published numbers for its EWMA."""

from __future__ import annotations

import pytest

from tapes.ewma import Rates

# After one tick with 3 events, minute by minute; from Dropwizard's own EWMATest.
ONE_MINUTE = [0.6, 0.22072766, 0.08120117, 0.02987224, 0.01098938, 0.00404277]
FIVE_MINUTES = [0.6, 0.49123845, 0.40219203, 0.32928698, 0.26959738, 0.22072766]
FIFTEEN_MINUTES = [0.6, 0.56130419, 0.52510399, 0.49123845, 0.45955700, 0.42991879]


@pytest.mark.parametrize("minute", range(6))
def test_rates_are_dropwizards_to_the_digit(minute):
    """update(3), tick, then a minute of twelve idle ticks at a time."""
    read = Rates.started(0).mark(3, 0).read(1 + 12 * minute)
    assert read == pytest.approx(
        (ONE_MINUTE[minute], FIVE_MINUTES[minute], FIFTEEN_MINUTES[minute]), abs=5e-9
    )
