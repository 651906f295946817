"""tapes.meta: metrics per class."""

from __future__ import annotations

import abc

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
    """__init_subclass__ and its keywords are intact."""

    class Base(metaclass=tapes.metered_meta([("hits", "hits.{}", registry.meter)])):
        def __init_subclass__(cls, flavour="none", **kwargs):
            super().__init_subclass__(**kwargs)
            cls.flavour = flavour

    class Impl(Base, flavour="sweet"):
        pass

    assert (Impl.flavour, Impl.hits.name) == ("sweet", "hits.Impl")
