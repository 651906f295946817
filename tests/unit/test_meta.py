"""tapes.meta: metrics per class."""

from __future__ import annotations

import abc
import enum

import pytest

import tapes


def test_every_class_has_metrics_of_its_own(registry):
    """Subclasses too, and the base class, named after each."""

    class Base(
        metaclass=tapes.metered_meta(
            metrics=[
                ("latency", "endpoints.{}.latency", registry.timer),
                ("error_rate", "endpoints.{}.error_rate", registry.meter),
            ],
            base=abc.ABCMeta,
        )
    ):
        @abc.abstractmethod
        def work(self):
            pass

    class Impl(Base):
        def work(self):
            with self.latency.time():
                return "done"

    assert Impl().work() == "done"
    stats = registry.get_stats().endpoints
    assert stats.Impl.latency["count"] == 1
    assert stats.Base.latency["count"] == 0
    assert "error_rate" in stats.Impl
    with pytest.raises(TypeError):
        Base()


def test_keyword_arguments_of_classes_pass_through(registry):
    """Keywords of a class statement reach __init_subclass__."""

    class Base(metaclass=tapes.metered_meta([("hits", "hits.{}", registry.meter)])):
        def __init_subclass__(cls, flavour="none", **kwargs):
            super().__init_subclass__(**kwargs)
            cls.flavour = flavour

    class Impl(Base, flavour="sweet"):
        pass

    assert (Impl.flavour, Impl.hits.name) == ("sweet", "hits.Impl")


def test_metrics_are_there_when_a_subclass_is_initialised(registry):
    """The metrics exist when __init_subclass__ runs."""
    seen = []

    class Base(metaclass=tapes.metered_meta([("hits", "hits.{}", registry.meter)])):
        def __init_subclass__(cls):
            seen.append(cls.hits.name)

    class Impl(Base):
        pass

    assert seen == ["hits.Impl"]
    assert Base.hits.name == "hits.Base"


def test_a_metaclass_with_a_namespace_of_its_own_is_left_in_peace(registry):
    """An enumeration keeps its members; the metrics are attributes, not members."""

    class Colour(
        enum.Enum, metaclass=tapes.metered_meta([("hits", "hits.{}", registry.meter)], enum.EnumMeta)
    ):
        RED = 1

    assert [colour.name for colour in Colour] == ["RED"]
    assert Colour.hits.name == "hits.Colour"


def test_slots_and_metaclass_methods_stay(registry):
    """__slots__ still save the dictionary; what the base metaclass can do the result can do."""

    class Verbose(type):
        def describe(cls):
            return f"a {cls.__name__}"

        def __call__(cls, *args):
            instance = super().__call__(*args)
            instance.made = True
            return instance

    class Slim(metaclass=tapes.metered_meta([("hits", "hits.{}", registry.meter)], base=Verbose)):
        __slots__ = ("made",)

    slim = Slim()
    assert (Slim.describe(), slim.made, hasattr(slim, "__dict__")) == ("a Slim", True, False)
    slim.hits.mark()
    assert registry.get_stats().hits.Slim["count"] == 1


def test_metered_metaclasses_can_be_stacked(registry):
    """One as the base of another: a class has the metrics of both."""
    first = tapes.metered_meta([("hits", "hits.{}", registry.meter)], base=abc.ABCMeta)

    class Both(metaclass=tapes.metered_meta([("latency", "latency.{}", registry.timer)], base=first)):
        pass

    assert (Both.hits.name, Both.latency.name) == ("hits.Both", "latency.Both")


@pytest.mark.parametrize(
    "metrics",
    [[("hits", "hits.{}")], [("hits", 5, tapes.meter)], [("hits", "hits.{}", None)], ["hits"]],
    ids=["two", "no text", "no factory", "a name"],
)
def test_a_metric_that_is_no_triple_is_refused_when_the_metaclass_is_made(metrics):
    """A metric that is no triple is refused when the metaclass is made, not with its first class."""
    with pytest.raises(tapes.TapesError, match="attribute, template, factory"):
        tapes.metered_meta(metrics)


def test_a_base_that_is_no_metaclass_is_refused():
    """A plain class is a common mistake."""
    with pytest.raises(tapes.TapesError, match="a metaclass"):
        tapes.metered_meta([], base=dict)


def test_a_metered_metaclass_can_be_combined_with_others(registry):
    """Cooperatively: every metaclass of the order makes its part."""

    class Combined(tapes.metered_meta([("hits", "hits.{}", registry.meter)]), abc.ABCMeta):
        pass

    class Base(metaclass=Combined):
        @abc.abstractmethod
        def work(self):
            pass

    assert isinstance(object(), Base) is False
    assert Base.hits.name == "hits.Base"
    with pytest.raises(TypeError):
        Base()
    assert tapes.metered_meta([], base=abc.ABCMeta).__name__ == "MeteredABCMeta"
