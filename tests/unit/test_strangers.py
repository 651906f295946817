"""Numbers that are not ours: what they raise, and what they leave behind."""

from __future__ import annotations

import decimal
import fractions
import logging
import platform

import pytest

import tapes
from tapes.metrics.folding import FULL

KINDS = {
    "counter": "increment", "meter": "mark", "histogram": "update", "timer": "update", "gauge": "increment"
}  # fmt: skip


class Panic(BaseException):
    pass


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no message")

    __repr__ = __str__


class Ours(float):
    pass


def raising(error):
    """Return a number whose every use raises ``error``."""

    def use(*_):
        raise error

    names = ["__float__", "__index__", "__lt__", "__gt__", "__add__", "__radd__", "__eq__", "__neg__"]
    if isinstance(error, Exception):
        names.append("__repr__")
    return type("Raiser", (), {**dict.fromkeys(names, use), "__hash__": object.__hash__})()


@pytest.mark.parametrize(
    "error", [Panic("gone"), Unspeakable(), RuntimeError("detached")], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_number_raises_costs_that_number_alone(registry, kind, error):
    """A number that raises costs only itself: not its batch, not later ones, and not the caller."""
    record = getattr(getattr(registry, kind)("m"), KINDS[kind])
    for _ in range(2):
        record(raising(error))
        for _ in range(FULL + 10):
            record(1)
    fields = registry.snapshot().get("m").fields()
    assert fields.get("count", fields.get("value")) == 2 * (FULL + 10)
    assert registry.get_stats().tapes.rejected.value == 2


@pytest.mark.parametrize(
    "number", [decimal.Decimal("4.5"), fractions.Fraction(9, 2), True, 2**70, Ours(4.5)], ids=repr
)
def test_what_a_reader_gets_are_plain_numbers(registry, number):
    """A reader gets plain numbers, whatever type was recorded, so they can be sent and written."""
    for kind in ("histogram", "timer"):
        metric = getattr(registry, kind)("m" + kind)
        for value in (5.0, 2e30) * 20:
            metric.update(value)
        registry.get_stats()
        for _ in range(40):
            metric.update(number)
        series = registry.snapshot().get("m" + kind)
        assert {type(value) for value in series.fields().values()} <= {int, float}
        assert series.lifetime.min == min(5.0, float(number))
        assert {type(end) for end in metric.collect().sketch[2:4]} == {float}


def test_a_log_that_fails_does_not_reach_the_caller(registry):
    """A handler's or a filter's exception is not the request's."""

    def fail(record):
        raise RuntimeError("the log is full")

    logger = logging.getLogger("tapes.registry")
    logger.addFilter(fail)
    try:
        for _ in range(FULL):
            registry.counter("c").increment("x")
    finally:
        logger.removeFilter(fail)
    assert registry.get_stats().tapes.rejected.value == FULL


def test_a_producer_whose_error_can_not_be_printed_hides_its_gauge_only(registry):
    """A producer whose error can't be printed hides its own gauge, and the others are read."""

    def produce():
        raise Unspeakable

    registry.gauge("bad", produce)
    registry.gauge("good", lambda: 3)
    assert "bad" not in registry.get_stats()
    assert registry.get_stats().good.value == 3


@pytest.mark.skipif(platform.python_implementation() == "PyPy", reason="PyPy can refer to anything weakly")
def test_a_weak_producer_must_be_referable(registry):
    """A weak producer that can't be weakly referenced is refused before a gauge is made."""

    class Slotted:
        __slots__ = ()

        def size(self):
            return 1

    with pytest.raises(tapes.TapesError, match="weakly referenced"):
        registry.gauge("g", Slotted().size, weak=True)
    registry.counter("g")
