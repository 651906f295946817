"""Names and labels have a bounded length, also on the wire: refused or cut where they enter."""

import logging

import pytest

import tapes
from tapes.distributed.protocol.messages import Item, Update
from tapes.distributed.protocol.wire import decode, encode
from tapes.errors import InvalidName, WireError
from tapes.naming import is_cut, label_text
from tapes.processes import Process

MAKERS = ("counter", "meter", "histogram", "timer", "gauge")


def label_of(metric, name="agent"):
    return dict(metric.labels)[name]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_long_label_is_cut_and_marked_and_stays_the_same_metric(registry, maker):
    """A label of more than 1,024 characters is cut and marked, and always gives the same metric."""
    long = "Mozilla/5.0 " * 300
    metric = getattr(registry, maker)("m", agent=long)
    assert len(label_of(metric)) == 1024
    assert long.startswith(label_of(metric)[:1007])
    assert label_of(metric)[1007] == "…"
    assert getattr(registry, maker)("m", agent=long) is metric
    assert getattr(registry, maker)("m", labels={"agent": long}) is metric
    assert getattr(registry, maker)("m", agent=label_of(metric)) is metric


def test_two_long_labels_that_differ_at_their_end_stay_two(registry):
    """Two long labels that differ only behind the cut stay two series."""
    one, other = (registry.counter("m", agent="x" * 5000 + end) for end in "ab")
    assert one is not other
    one.increment(1)
    other.increment(2)
    assert sorted(series.value for series in registry.snapshot().series("m")) == [1, 2]


@pytest.mark.parametrize("text", ["", "x", "x" * 1023, "x" * 1024, "é" * 1024, "\ud800" * 1024])
def test_a_label_of_1024_characters_is_left_as_it_is(text):
    """A label of up to 1,024 characters stays as it is."""
    assert label_text(text) == text
    assert not is_cut(text)


@pytest.mark.parametrize("value", ["é" * 1025, "\ud800" * 2000, b"x" * 2000, 10**2000, ["x"] * 1000])
def test_whatever_becomes_a_long_text_is_cut(value):
    """A label of any type is cut if its text is too long, and the cut text is not cut again."""
    text = label_text(value)
    assert len(text) == 1024
    assert is_cut(text)
    assert label_text(text) == text


def test_cut_labels_are_counted_and_logged_once_for_each_name(registry, caplog):
    """Cut labels are counted in ``tapes.labels.cut`` and logged once for each name."""
    for number in range(3):
        registry.counter("m", agent=f"{number}" + "x" * 2000).increment()
    registry.counter("m", agent="2" + "x" * 2000).increment()
    registry.counter("n", agent="x" * 2000).increment()
    assert registry.get_stats().tapes.labels.cut.value == 4
    cut = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(cut) == 2
    assert cut[0].startswith("tapes cut a label's value of 'm' at 1024 characters")


def test_the_labels_of_a_registry_are_cut_too():
    """The labels that a registry gives to all metrics are cut too."""
    registry = tapes.Registry(labels={"host": "h" * 3000})
    assert len(label_of(registry.counter("m"), "host")) == 1024


def test_a_name_has_32_segments_and_255_characters_at_most(registry):
    """A name of more than 32 segments or 255 characters is refused with an error that gives the limits."""
    for name in (".".join("a" * 32), "a" * 255):
        registry.counter(name).increment()
    for name in (".".join("a" * 33), "a" * 256, ".".join(["segment"] * 300)):
        with pytest.raises(
            InvalidName, match=r"name is too long: got .*255 characters and 32 segments at most"
        ):
            registry.counter(name)
        with pytest.raises(InvalidName):
            registry.describe(name, "A sentence.")
    assert registry.get_stats()["a" * 255].value == 1


def test_the_prefix_counts_as_part_of_the_name():
    """The prefix of a registry counts for the maximum length of names."""
    registry = tapes.Registry(prefix="p" * 200)
    registry.counter("a" * 54)
    with pytest.raises(InvalidName, match="too long"):
        registry.counter("a" * 55)
    with pytest.raises(InvalidName, match="too long"):
        tapes.Registry(prefix="p" * 300)


def update(name, labels, registry):
    (item,) = [Item(*series) for series in registry.collect()]
    return Update(b"1" * 16, Process(1, 0), "host", 1, 0, [item._replace(name=name, labels=labels)], {})


@pytest.mark.parametrize(
    ("name", "labels"),
    [("a" * 256, ()), (".".join("a" * 33), ()), ("a", (("agent", "x" * 1025),))],
    ids=["characters", "segments", "label"],
)
def test_a_message_is_held_to_the_same_limits(registry, name, labels):
    """A message with a name or a label beyond the limits is a WireError."""
    registry.counter("m").increment()
    assert decode(encode(update("a" * 255, (("agent", "x" * 1024),), registry)))
    with pytest.raises(WireError):
        decode(encode(update(name, labels, registry)))


@pytest.mark.parametrize("maker", MAKERS)
def test_what_a_maker_accepts_is_accepted_on_the_wire(registry, maker):
    """All names and labels that a maker accepts are accepted on the wire; a refusal would lose an update."""
    getattr(registry, maker)(".".join("a" * 32), agent="\ud800é\n" * 1000, b="x" * 9999)
    items = [Item(*series) for series in registry.collect()]
    whole = Update(b"1" * 16, Process(1, 0), "host", 1, 0, items, {})
    assert decode(encode(whole)).items == items
