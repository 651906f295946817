"""What completion and help show of the public classes."""

from __future__ import annotations

import abc
import copy
import pydoc
import re

import pytest

import tapes

MAKERS = {"counter", "gauge", "histogram", "meter", "timer"}
OF_REGISTRY = MAKERS | {
    "clock", "describe", "get_stats", "get_stats_async", "max_series", "remove", "snapshot",
}  # fmt: skip
OF_METRIC = {"kind", "labels", "name"}
SHOWN = {
    tapes.Registry: OF_REGISTRY,
    tapes.DistributedRegistry: OF_REGISTRY | {"close", "connect", "socket_addr"},
    tapes.Counter: OF_METRIC | {"decrement", "increment"},
    tapes.Gauge: OF_METRIC | {"decrement", "increment", "mode", "set"},
    tapes.Histogram: OF_METRIC | {"update"},
    tapes.Meter: OF_METRIC | {"mark"},
    tapes.Timer: OF_METRIC | {"time", "update"},
}


def of(kind):
    if issubclass(kind, tapes.Registry):
        return kind()
    return getattr(tapes.Registry(), kind.kind)("a")


def public(names):
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.__name__)
def test_completion_shows_the_public_names_alone(kind):
    """dir() of an object has the documented names, and none that only the rest of tapes uses."""
    assert public(dir(of(kind))) == SHOWN[kind]
    assert public(dir(kind)) <= SHOWN[kind]


@pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.__name__)
def test_help_shows_the_public_methods_alone(kind):
    """help() of a class mentions each public method, and no internal one."""
    text = pydoc.plain(pydoc.render_doc(kind))
    methods = {name for name in dir(kind) if callable(getattr(kind, name)) and not name.startswith("_")}
    assert all(f" {name}(" in text for name in methods)
    internal = {name for every in kind.__mro__ for name in vars(every)} - set(dir(kind))
    assert "collect" in internal
    assert not [name for name in public(internal) if re.search(rf"^ \|  {name}(\(|$)", text, re.MULTILINE)]


def test_what_a_subclass_adds_is_shown():
    """A registry class of an application shows its own methods and attributes."""

    class Mine(tapes.Registry):
        def report_all(self):
            """Report."""

    mine = Mine()
    mine.extra = 1
    assert {"report_all", "extra"} <= set(dir(mine))
    assert public(dir(mine)) == OF_REGISTRY | {"report_all", "extra"}


def test_hidden_names_stay_reachable():
    """What dir() does not list is still an attribute, also of a copy."""
    counter = tapes.Registry().counter("a")
    assert counter.collect().is_empty
    assert copy.copy(counter).state is counter.state


def test_a_subclass_of_a_registry_may_be_abstract():
    """A subclass of a registry may have abstract methods."""

    class Base(tapes.Registry, abc.ABC):
        @abc.abstractmethod
        def name(self):
            pass

    with pytest.raises(TypeError, match="abstract"):
        Base()
    assert type("Whole", (Base,), {"name": lambda self: "x"})().get_stats() == {}
