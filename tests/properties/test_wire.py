"""The wire: every message comes back, and whatever else comes in is a WireError."""

from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapes
from tapes.distributed.protocol.messages import (
    Attach,
    Cursor,
    Flush,
    Goodbye,
    HandOver,
    Item,
    Merged,
    Read,
    Record,
    Reply,
    Retired,
    SentCount,
    Update,
)
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.errors import WireError
from tapes.metrics import KINDS, MERGE_MODES, CounterState, GaugeState
from tapes.metrics.origin import Origin
from tapes.processes import Process
from tapes.snapshot import Description
from tapes.sums import Total
from tapes.testing import ManualClock

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=12)
names = st.from_regex(r"[a-z]{1,4}(\.[a-z]{1,4}){0,2}", fullmatch=True)
identities = st.binary(min_size=16, max_size=16).filter(any)


processes = st.builds(Process, st.integers(1, 2**31 - 1), st.integers(0, 2**60))


@st.composite
def updates(draw, ancestors=1):
    """An update of a registry that recorded something in every kind of metric."""
    clock = ManualClock(draw(st.integers(0, 10**6)))
    registry = tapes.Registry(clock=clock)
    label, mode = draw(text), draw(st.sampled_from(MERGE_MODES))
    for number in draw(st.lists(st.one_of(finite, st.integers()), max_size=10)):
        registry.counter("c", l=label).increment(abs(number))
        registry.meter("m").mark(abs(number))
        registry.histogram("h", l=label).update(number)
        registry.timer("t").update(abs(number))
        registry.gauge("g", merge=mode).set(number if abs(number) < 2**60 else 0)
        clock.advance(draw(st.integers(0, 20)))
    registry.counter("c", l=label).decrement(3)
    items = [Item(*series) for series in registry.collect()]
    described = {
        name: Description(draw(text), draw(st.one_of(st.none(), text)), tuple(sorted(draw(st.sets(finite)))))
        for name in draw(st.sets(names))
    }
    base = draw(st.integers(0, 5))
    before = draw(st.lists(updates(ancestors=0), max_size=2)) if ancestors else []
    return Update(
        draw(identities), draw(processes), "host", base + 1, base, items, described,
        tuple(before), draw(st.integers(1, 10**6)),
    )  # fmt: skip


messages = st.one_of(
    updates(),
    st.builds(Read, st.integers(0, 99), text, updates()),
    st.builds(Attach, st.integers(0, 99), text, st.lists(processes, max_size=3).map(tuple)),
    st.builds(Goodbye, st.integers(0, 99), updates()),
    st.builds(Flush, st.integers(0, 99)),
    st.builds(Reply, st.integers(0, 99), text, st.binary()),
    st.builds(lambda update: Merged(3, update.items, update.descriptions), updates()),
    st.builds(lambda update: Retired(update.items), updates()),
    st.builds(lambda update: Record(update, True, 1, (bytes(16),), (7,) * len(update.items)), updates()),
    st.builds(
        lambda update, sent: Cursor("t", tuple(SentCount(i.name, i.labels, sent) for i in update.items)),
        updates(),
        st.one_of(st.none(), st.tuples(*[st.one_of(finite, st.integers(-(10**30), 10**30))] * 3)),
    ),
)


@given(messages)
@settings(max_examples=60)
def test_every_message_comes_back_as_it_was(message):
    """decode(encode(x)) == x, for all kinds of messages and of metrics."""
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error(data):
    """Random bytes are decoded to a message or raise WireError, and nothing else."""
    with pytest.raises(WireError):
        decode(data)


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), text, st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(text, inner, max_size=3)),
    max_leaves=20,
)


@given(
    st.sampled_from(["Update", "Read", "Goodbye", "Flush", "Reply", "Merged", "Other"]),
    st.lists(plain, max_size=8),
)
def test_well_packed_nonsense_is_a_wire_error_or_a_valid_message(name, fields):
    """Fields of wrong number, type or range are found one by one."""
    try:
        message = decode(msgpack.packb([VERSION, name, *fields]))
    except WireError:
        return
    assert decode(encode(message)) == message


@given(updates(), st.data())
def test_one_changed_field_is_found_or_harmless(update, data):
    """Replace any one node of a valid message: a WireError, or a message that is valid again."""
    tree = msgpack.unpackb(encode(update))
    node, places = tree, []
    while isinstance(node, list) and node:
        index = data.draw(st.integers(0, len(node) - 1))
        places.append((node, index))
        node = node[index]
    parent, index = data.draw(st.sampled_from(places))
    parent[index] = data.draw(plain)
    try:
        message = decode(msgpack.packb(tree))
    except WireError:
        return
    assert decode(encode(message)) == message


@pytest.mark.parametrize("version", [0, -1, VERSION - 2, VERSION + 1, 99, "1", None, True])
def test_another_version_is_refused(version):
    """The error of a message of another wire version names the version."""
    with pytest.raises(WireError, match="version"):
        decode(msgpack.packb([version, "Attach", 1, "here", []]))


def test_a_reply_is_understood_in_every_version():
    """An older aggregator replies to a hand-over of any version."""
    assert decode(msgpack.packb([VERSION + 7, "Reply", 1, "ok", b""])) == Reply(1, "ok", b"")
    hand_over = msgpack.packb([VERSION + 7, "HandOver", 1, VERSION + 7])
    assert decode(hand_over) == HandOver(1, VERSION + 7)


def test_a_sketch_whose_bins_do_not_add_up_is_refused():
    """A sketch whose bins, count and sum do not belong together is a WireError."""
    registry = tapes.Registry()
    registry.histogram("h").update(1)
    update = Update(bytes(range(16)), Process(1, 0), "", 1, 0, [Item(*s) for s in registry.collect()], {})
    tree = msgpack.unpackb(encode(update))
    tree[7][0][3][0][0] = 2
    with pytest.raises(WireError, match="add up"):
        decode(msgpack.packb(tree))


@pytest.mark.parametrize("number", [2**63, 2**64, 10**25, -(10**25)])
def test_totals_of_many_workers_are_exact(number):
    """An integer that MessagePack does not have stays exact in every part of a count; a gauge is a float."""
    state = CounterState(Total(abs(number)), Total(abs(number) + 1), Origin(1.0, number))
    gauge = GaugeState(number, "sum", 1.0)
    back = decode(encode(Merged(1, [Item("counter", "c", (), state), Item("gauge", "g", (), gauge)], {})))
    assert back.items[0].state == state
    assert back.items[1].state.value == float(number)
    cursor = Cursor("statsd", (SentCount("c", (("a", "b"),), (number, abs(number), 0.5)),))
    assert decode(encode(cursor)) == cursor


def test_a_nan_is_refused():
    """Nothing that would poison a sum gets in."""
    registry = tapes.Registry()
    registry.gauge("g").set(1)
    update = Update(bytes(range(16)), Process(1, 0), "", 1, 0, [Item(*s) for s in registry.collect()], {})
    tree = msgpack.unpackb(encode(update))
    tree[7][0][3][0] = math.nan
    with pytest.raises(WireError, match="finite"):
        decode(msgpack.packb(tree))


def test_a_new_kind_or_merge_mode_raises_the_version():
    """An older release refuses whole updates that have one. If this test fails, raise `VERSION` too."""
    modes = ("sum", "max", "min", "mean", "last", "each")
    assert (VERSION, MERGE_MODES, tuple(KINDS)) == (
        1, modes, ("counter", "gauge", "histogram", "meter", "timer"),
    )  # fmt: skip
