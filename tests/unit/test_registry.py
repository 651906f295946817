"""tapes.registry: names, labels, and what is refused."""

from __future__ import annotations

import enum
import logging
import pickle
import threading

import pytest

import tapes
from tapes.errors import InvalidArgument, InvalidCall, InvalidLabel, InvalidName, KindConflict

MAKERS = ["counter", "gauge", "histogram", "meter", "timer"]


@pytest.mark.parametrize("maker", MAKERS)
def test_the_same_name_and_labels_are_the_same_metric(registry, maker):
    """The same name and labels give the same metric, in any order and spelling of the labels."""
    make = getattr(registry, maker)
    one = make("a.b", queue="mail", region="eu")
    assert make("a.b", region="eu", queue="mail") is one
    assert make("a.b", labels={"queue": "mail", "region": "eu"}) is one
    assert make("a.b", labels={"queue": "mail"}, region="eu") is one
    assert make("a.b", queue="mail", region="us") is not one
    assert make("a.b") is not one


def test_equal_values_with_different_texts_are_different_labels(registry):
    """1, True and 1.0 are equal in Python, and three labels."""
    metrics = {registry.counter("c", l=value) for value in (1, True, 1.0, "1")}
    assert {metric.labels for metric in metrics} == {(("l", "1"),), (("l", "True"),), (("l", "1.0"),)}
    assert registry.counter("c", l=1) is registry.counter("c", l="1")


def test_a_string_subclass_is_the_string_that_it_equals(registry):
    """An enum of strings is looked up as its value."""
    colour = enum.Enum("Colour", {"RED": "red"}, type=str)
    assert registry.counter("c", l=colour.RED) is registry.counter("c", l="red")


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("word", ["producer", "merge", "weak", "unit", "help", "buckets", "labels", "name"])
def test_reserved_words_are_refused_as_keywords_and_reachable_through_labels(registry, maker, word):
    """They are, or may become, arguments."""
    make = getattr(registry, maker)
    with pytest.raises((InvalidLabel, InvalidArgument, TypeError)):
        make("m", **{word: "x" if word != "name" else "y"})
    assert make("m", labels={word: "x"}).labels == ((word, "x"),)


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b", "a.{b}", "{", "a\nb", 5, None, b"a"])
def test_bad_names_are_refused_with_what_was_expected(registry, name):
    """At once, where the caller sees it."""
    with pytest.raises(InvalidName, match="expected"):
        registry.counter(name)


@pytest.mark.parametrize("label", ["", "a-b", "1a", "__name__", "a.b", 5])
def test_bad_label_names_are_refused(registry, label):
    """What Prometheus would not take either."""
    with pytest.raises(InvalidLabel, match="expected"):
        registry.counter("c", labels={label: "x"})


def test_a_label_given_twice_is_refused(registry):
    """There is no right one of the two."""
    with pytest.raises(InvalidLabel, match="twice"):
        registry.counter("c", labels={"l": 1}, l=2)


@pytest.mark.parametrize("labels", [5, "ab", [("a", "b")]])
def test_labels_that_are_no_mapping_are_refused(registry, labels):
    """With a sentence, not an AttributeError."""
    with pytest.raises(InvalidLabel, match="mapping"):
        registry.counter("c", labels=labels)


def test_another_kind_under_the_same_name_names_both(registry):
    """Also with other labels, and without spoiling the first."""
    registry.counter("a.b").increment()
    with pytest.raises(KindConflict, match=r"counter.*timer\('a\.b'\)"):
        registry.timer("a.b", l="x")
    assert registry.get_stats().a.b.value == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_may_not_hide_a_field_of_the_one_above(registry, order):
    """A name that would hide a field of its parent is refused, whichever of the two is made first."""
    makers = [lambda: registry.counter("a"), lambda: registry.meter("a.value")][::order]
    makers[0]()
    with pytest.raises(KindConflict, match="value"):
        makers[1]()


def test_parent_and_child_may_both_exist(registry):
    """In the tree, the child stands beside its parent's fields."""
    registry.counter("a.b").increment()
    registry.counter("a.b.c").increment(2)
    registry.counter("a.b", l="x").increment(3)
    tree = registry.get_stats()
    assert (tree.a.b.value, tree.a.b.c.value, tree.a.b['{l="x"}'].value) == (1, 2, 3)


def test_selectors_are_spelled_as_prometheus_does(registry):
    """Selectors in the tree are spelled as in Prometheus, with sorted labels and escaped values."""
    registry.counter("c", labels={"z": "1", "a": 'q"\\\n'})
    assert list(registry.get_stats().c) == ['{a="q\\"\\\\\\n",z="1"}']


def test_the_tree_is_frozen(registry):
    """A mistyped name is a KeyError, not an empty dict."""
    registry.counter("a.b")
    with pytest.raises(KeyError):
        registry.get_stats().a.typo


def test_prefix_and_common_labels(registry):
    """Both are part of every series."""
    registry = tapes.Registry(prefix="shop.web", labels={"host": "h1"})
    registry.counter("c", l="x").increment()
    assert registry.snapshot().get("shop.web.c", host="h1", l="x").value == 1


def test_label_sets_are_bounded_and_nothing_is_lost(caplog):
    """Past max_series, events go to one overflow series; none is lost, and one warning is logged."""
    registry = tapes.Registry(max_series=10)
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            registry.counter("c", user=number).increment()
    series = registry.snapshot().series("c")
    assert len(series) == 11
    assert registry.snapshot().get("c", overflow="true").value == 990
    assert sum(one.value for one in series) == 1000
    assert len(caplog.records) == 1


def test_label_sets_are_bounded_under_threads():
    """Threads that make series at the same moment take at most one place too many each, and lose nothing."""
    registry = tapes.Registry(max_series=100)
    barrier = threading.Barrier(8)

    def make():
        barrier.wait()
        for number in range(500):
            registry.counter("c", user=number).increment()

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    series = registry.snapshot().series("c")
    assert 101 <= len(series) <= 108
    assert sum(one.value for one in series) == 4000


def test_removed_series_are_gone_and_make_room():
    """A removed series leaves the snapshot and makes room; a new one with its name starts at zero."""
    registry = tapes.Registry(max_series=1)
    registry.counter("c", l="a").increment()
    assert registry.remove("c", l="a")
    assert not registry.remove("c", l="a")
    assert not registry.remove("nothing")
    registry.counter("c", l="b").increment()
    registry.counter("c", l="a").increment()
    values = {one.labels: one.value for one in registry.snapshot().series("c")}
    assert values == {(("l", "b"),): 1, (("overflow", "true"),): 1}


def test_a_removed_metric_is_not_found_in_the_cache(registry):
    """After a removal the next look-up makes a new metric."""
    old = registry.counter("c", l="a")
    registry.remove("c", l="a")
    assert registry.counter("c", l="a") is not old


def test_a_removed_name_may_become_another_kind(registry):
    """Once all its series are gone."""
    registry.counter("c")
    registry.remove("c")
    registry.gauge("c").set(2)
    assert registry.get_stats().c.value == 2


@pytest.mark.parametrize(("text", "unit"), [("x", 5), (None, None), (5, "s")])
def test_descriptions_are_checked(registry, text, unit):
    """Where they are given, not where they are written."""
    with pytest.raises(InvalidArgument, match="describe"):
        registry.describe("c", text, unit=unit)


@pytest.mark.parametrize(
    "buckets", [(1, 1), (2, 1), (1, float("inf")), (float("nan"),), ("x",), 5, range(1001)]
)
def test_buckets_are_checked(registry, buckets):
    """Buckets have to be ascending and finite, or they are refused."""
    with pytest.raises(InvalidArgument, match="ascending"):
        registry.describe("c", "text", buckets=buckets)


@pytest.mark.parametrize("producer", [5, "x", object()])
def test_a_producer_must_be_callable(registry, producer):
    """gauge(name, value), a common mistake, is refused: a producer has to be callable."""
    with pytest.raises(InvalidArgument, match="set"):
        registry.gauge("g", producer)


def test_merge_modes_are_checked(registry):
    """An unknown mode, and a mode that differs from the one it was made with."""
    with pytest.raises(InvalidArgument, match="each"):
        registry.gauge("g", merge="average")
    registry.gauge("g", merge="max")
    assert registry.gauge("g").mode == "max"
    with pytest.raises(KindConflict, match="max"):
        registry.gauge("g", merge="min")


def test_iterating_while_others_register_never_fails(registry):
    """Reads beside a thread that makes metrics all the time."""
    done = threading.Event()

    def make():
        for number in range(3000):
            registry.counter(f"n{number}", l=number % 5)
        done.set()

    thread = threading.Thread(target=make)
    thread.start()
    while not done.is_set():
        registry.get_stats()
    thread.join()
    assert len(registry.snapshot()) == 3000


def test_descriptions_reach_the_snapshot(registry):
    """A description is in the snapshot also if it came before its metric; timers are always in seconds."""
    registry.describe("h", "How large.", unit="bytes")
    registry.histogram("h")
    registry.timer("t")
    snapshot = registry.snapshot()
    assert (snapshot.family("h").text, snapshot.family("h").unit) == ("How large.", "bytes")
    assert snapshot.family("t").unit == "seconds"


def test_a_full_snapshot_answers_by_name_and_labels(registry):
    """get() and series(), with labels spelled either way."""
    registry.counter("c", l=1).increment(4)
    snapshot = registry.snapshot()
    assert snapshot.get("c", l=1).value == snapshot.get("c", labels={"l": "1"}).value == 4
    assert snapshot.get("c") is None
    assert snapshot.series("nothing") == ()
    assert [family.name for family in snapshot] == ["c"]


@pytest.mark.parametrize(("first", "second"), [("a.value", "a"), ("a", "a.value")])
def test_a_removed_name_blocks_no_other_name(registry, first, second):
    """A removed name blocks neither a name above it nor one below it."""
    registry.counter(first)
    with pytest.raises(tapes.TapesError, match="hide"):
        registry.counter(second)
    assert registry.remove(first)
    registry.counter(second).increment()
    assert registry.snapshot().get(second).value == 1


MAKERS = ["counter", "gauge", "histogram", "meter", "timer"]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_name_can_be_a_keyword(registry, maker):
    """And gives the same metric as one by position."""
    make = getattr(registry, maker)
    assert make(name="a") is make("a")
    assert make(name="a", queue="mail") is make("a", queue="mail") is not make("a")


@pytest.mark.parametrize("maker", MAKERS)
def test_any_word_that_is_no_argument_can_be_a_label(registry, maker):
    """Also one that is a word of the language of methods."""
    assert getattr(registry, maker)("a", self="x", cls="y", kind="z").labels == (
        ("cls", "y"), ("kind", "z"), ("self", "x"),
    )  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
def test_labels_by_position_are_an_error_also_of_a_metric_that_is_there(registry, maker):
    """Two words behind the name are no label and its value."""
    make = getattr(registry, maker)
    make("a", m="x")
    for wrong in (("a", "m", "x"), ("a", None, "m", "x")):
        with pytest.raises(TypeError):
            make(*wrong)
    with pytest.raises(InvalidCall, match="positional"):
        make("a", None, "x")


def test_names_of_tapes_are_refused_but_for_its_own(registry):
    """Under any prefix that makes such a name; a name that only looks alike is allowed."""
    for wrong in ("tapes.rejected", "tapes.x", "tapes.a.b"):
        with pytest.raises(InvalidName, match=r"'tapes\.'"):
            registry.counter(wrong)
    for wrong in ("tapes", "tapes.shop"):
        with pytest.raises(InvalidName, match=r"'tapes\.'"):
            tapes.Registry(prefix=wrong)
    assert tapes.Registry(prefix="shop").counter("tapes.x").name == "shop.tapes.x"
    assert registry.counter("tapestry.x").name == "tapestry.x"
    registry.counter("a").increment("bad")
    assert registry.get_stats().tapes.rejected.value == 1


def test_wrong_names_are_attribute_errors_and_cost_nothing_else(registry):
    """hasattr() is false, a default is returned, and neither an object nor its class shows the name."""
    for maker, name in (("counter", "inc"), ("gauge", "dec"), ("histogram", "observe"), ("timer", "record")):
        metric = getattr(registry, maker)(maker)
        assert not hasattr(metric, name)
        assert getattr(metric, name, None) is None
        assert name not in dir(metric)
        assert name not in dir(type(metric))
        assert type(metric).__getattribute__ is object.__getattribute__
        assert not hasattr(type(metric), "__getattr__")


def test_the_labels_of_a_metric_are_a_tuple(registry):
    """Equal to one, with its hash; they explain themselves where they are called."""
    labels = registry.counter("a", queue="mail").labels
    assert labels == (("queue", "mail"),)
    assert hash(labels) == hash((("queue", "mail"),))
    assert type(pickle.loads(pickle.dumps(labels))) is tuple
    with pytest.raises(InvalidCall, match="the maker"):
        labels(queue="mail")
