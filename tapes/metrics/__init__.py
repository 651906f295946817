"""The kinds of metrics, one in a file.

A metric appends what it records to a buffer, and folds the buffer into an immutable, mergeable state from
time to time (`tapes.metrics.folding`). Only a registry makes metrics.
"""

from tapes.metrics.base import Metric
from tapes.metrics.counter import Counter, CounterState
from tapes.metrics.folding import State
from tapes.metrics.gauge import MERGE_MODES, Gauge, GaugeState
from tapes.metrics.histogram import Histogram, HistogramState
from tapes.metrics.meter import Meter, MeterState
from tapes.metrics.timer import Timer, TimerState

__all__ = [
    "KINDS", "MERGE_MODES", "Counter", "CounterState", "Gauge", "GaugeState", "Histogram",
    "HistogramState", "Meter", "MeterState", "Metric", "State", "Timer", "TimerState",
]  # fmt: skip

KINDS: dict[str, type[State]] = {
    "counter": CounterState, "gauge": GaugeState, "histogram": HistogramState, "meter": MeterState,
    "timer": TimerState,
}  # fmt: skip
"""Kind to its mergeable state."""
