"""numpy's numbers and ``timedelta`` are recorded as plain ones, with no warning and no exception."""

import warnings
from datetime import timedelta

import pytest

import tapes
from tapes.metrics.folding import FULL

RECORDERS = {
    "counter": "increment", "meter": "mark", "histogram": "update", "timer": "update", "gauge": "increment"
}  # fmt: skip
TYPES = ("float16", "float32", "float64", "longdouble", "int8", "uint8", "int64", "bool_")


def whole(registry, name="m"):
    fields = registry.snapshot().get(name).fields()
    return fields.get("sum", fields.get("count", fields.get("value")))


@pytest.mark.parametrize("action", ["error", "always"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", RECORDERS)
def test_a_number_of_numpy_is_recorded_as_a_plain_one(registry, kind, dtype, action):
    """numpy's numbers of all types are recorded exactly, without a warning, and read as Python's numbers."""
    numpy = pytest.importorskip("numpy")
    value = getattr(numpy, dtype)(60000 if dtype.startswith("float") else 1)
    record = getattr(getattr(registry, kind)("m"), RECORDERS[kind])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        for _ in range(2 * FULL + 10):
            record(value)
        assert whole(registry) == float(value) * (2 * FULL + 10)
    assert caught == []
    assert {type(field) for field in registry.snapshot().get("m").fields().values()} <= {int, float}


@pytest.mark.parametrize("kind", RECORDERS)
def test_numbers_of_numpy_among_plain_ones_are_recorded_where_warnings_are_errors(registry, kind):
    """numpy's numbers among plain ones are recorded exactly even if warnings are errors."""
    numpy = pytest.importorskip("numpy")
    record = getattr(getattr(registry, kind)("m"), RECORDERS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(FULL):
            for value in (1.0, numpy.float16(60000), numpy.float32(2), 3):
                record(value)
        assert whole(registry) == FULL * 60006
    assert "tapes" not in registry.get_stats()


@pytest.mark.parametrize("kind", RECORDERS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_and_infinity_of_numpy_are_dropped_and_counted(registry, kind, dtype):
    """numpy's NaN and infinities are dropped and counted, and other values are recorded."""
    numpy = pytest.importorskip("numpy")
    number = getattr(numpy, dtype)
    record = getattr(getattr(registry, kind)("m"), RECORDERS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in ("nan", "inf", "-inf"):
            record(number(value))
        record(number(2))
        assert whole(registry) == 2
    assert registry.get_stats().tapes.rejected.value == 3


def test_an_array_is_dropped_and_counted(registry):
    """An array is no number: it is dropped and counted by every kind of metric."""
    numpy = pytest.importorskip("numpy")
    for kind, method in RECORDERS.items():
        getattr(getattr(registry, kind)(kind), method)(numpy.array([1.0, 2.0]))
    registry.gauge("set").set(numpy.array([1.0, 2.0]))
    registry.get_stats()
    assert registry.get_stats().tapes.rejected.value == len(RECORDERS) + 1


@pytest.mark.parametrize("dtype", TYPES)
def test_a_gauge_is_set_to_and_produces_numbers_of_numpy(registry, dtype):
    """A gauge can be set to numpy's numbers, and its producer can return them."""
    numpy = pytest.importorskip("numpy")
    value = getattr(numpy, dtype)(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.gauge("m").set(value)
        registry.gauge("produced", lambda: value)
        assert (whole(registry), whole(registry, "produced")) == (1, 1)


class Lasting(timedelta):
    pass


@pytest.mark.parametrize("duration", [timedelta(milliseconds=1500), Lasting(seconds=1.5)])
def test_a_timer_takes_a_timedelta(registry, duration):
    """A timer records a timedelta, also one of a subclass, as seconds."""
    timer = registry.timer("t")
    for _ in range(FULL):
        timer.update(duration)
        timer.update(0.5)
    assert registry.snapshot().get("t").sum == FULL * 2.0


def test_a_negative_timedelta_is_dropped_and_a_histogram_takes_none(registry):
    """A timer drops negative timedeltas, and a histogram drops all of them; both are counted."""
    registry.timer("t").update(timedelta(seconds=-1))
    registry.histogram("h").update(timedelta(seconds=1))
    registry.get_stats()
    assert registry.get_stats().tapes.rejected.value == 2
    assert registry.snapshot().get("t").count == registry.snapshot().get("h").count == 0


def test_recording_never_raises_a_warning_of_a_foreign_number():
    """A number that warns in every operation is dropped like one that raises."""

    class Warns:
        def __float__(self):
            warnings.warn("from a number", RuntimeWarning, stacklevel=1)
            return 1.0

        def __lt__(self, other):
            warnings.warn("compared", UserWarning, stacklevel=1)
            return False

        __gt__ = __radd__ = __add__ = __lt__

    registry = tapes.Registry()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, method in RECORDERS.items():
            record = getattr(getattr(registry, kind)(kind), method)
            for _ in range(FULL):
                record(1)
                record(Warns())
            assert whole(registry, kind) == FULL, kind
