"""The wire and strangers: nothing that comes in breaks a decoder or a ledger, or fills the memory."""

from __future__ import annotations

import contextlib
import os
import time

import msgpack
import pytest

import tapes
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol import wire
from tapes.distributed.protocol.messages import Attach, Item, Merged, Reply, Update
from tapes.distributed.protocol.unpacker import PIECE_BYTES
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.errors import WireError
from tapes.processes import Process
from tapes.sketch import EMPTY, Sketch
from tapes.snapshot import Description
from tapes.sums import Total
from tapes.testing import ManualClock
from tests.fuzz import TICK, check_harmless, check_readable, fuzz

MESSAGES = int(os.environ.get("TAPES_FUZZ_MESSAGES", "15000"))
BYTES_PER_BYTE = 32
PIECE_MEMORY = 128 << 20

TOTAL = [5, []]
ORIGIN = [1.7e9, 0]
RATES = [TICK, 1.0, [1.0, 1.0, 1.0], 1, 1.0]
SKETCH = [2, [3.0], 1.0, 2.0, [0x3F80, 0x4000], [1, 1], TICK, [1.0, 1.0], 3.0]


def update_of(*items, identity=b"1" * 16, described=(), max_series=5):
    """The bytes of an update with ``items`` in it, whatever they are."""
    fields = [identity, [1, 0], "h", 1, 0, list(items), list(described), [], max_series, 0]
    return msgpack.packb([VERSION, "Update", *fields], unicode_errors="surrogatepass")


def counter(up=TOTAL, origin=ORIGIN, name="c", labels=()):
    return ["counter", name, labels, [up, [0, []], origin]]


def meter(rates):
    return ["meter", "m", [], [TOTAL, rates, ORIGIN]]


def histogram(sketch):
    return ["histogram", "h", [], [sketch, ORIGIN]]


def timer(sketch):
    return ["timer", "t", [], [sketch, RATES, ORIGIN]]


def changed(plain, index, value):
    return [*plain[:index], value, *plain[index + 1 :]]


def decoded(item, identity=b"1" * 16):
    return decode(update_of(item, identity=identity))


def test_generated_messages_are_refused_or_harmless(caplog):
    """Some thousands of what `make fuzz` makes a million of; each must take bounded time."""
    caplog.set_level("CRITICAL", "tapes")
    counts = fuzz(MESSAGES, seed=1)
    assert counts.valid > MESSAGES / 8
    assert counts.refused > MESSAGES / 8


# Memory, depth and length.

LONG = PIECE_BYTES * 5 // 4


def listed(filler, size):
    """A list of ``size`` bytes, full of ``filler``."""
    count = size // len(filler)
    return b"\xdd" + count.to_bytes(4, "big") + filler * count


def head(name, count):
    return bytes([0x90 + count]) + msgpack.packb(VERSION) + msgpack.packb(name)


START = update_of(0)[:-4]  # up to its first series
HOSTILE = {
    "empty lists": head("Reply", 5) + listed(b"\x90", LONG),
    "empty maps": head("Reply", 5) + listed(b"\x80", LONG),
    "lists of one": head("Reply", 5) + b"\x01\xa1a" + listed(b"\x91\xe0", LONG),
    "a name full of numbers": b"\x95\x02" + listed(b"\xe0", LONG),
    "a series full of numbers": START + listed(b"\xe0", LONG),
    "a series with long labels full of numbers": START
    + b"\x94\xa7counter\xa1c\x92\x92\xa1a" + listed(b"\xe0", LONG) + b"\x92\xa1b\xa1b\xc0",
    "a series with a state full of numbers": START + b"\x94\xa7counter\xa1c\x90" + listed(b"\xe0", LONG),
    "many pieces": START + listed(b"\xe0", PIECE_BYTES // 16) * 9,
    "announced lists in each other": head("Reply", 5) + b"\xdd\x00\xff\xff\xff" * 1000,
    "announced lists in a series": START + b"\xdd\x00\xff\xff\xff" * 1000,
    "a wide text": head("Reply", 5) + b"\x01" + msgpack.packb("a" * LONG + "😀") + b"\xc4\x00",
    "processes": head("Attach", 5) + b"\x01\xa1a" + listed(b"\x92\x01\x00", 3 << 16),
    "too many processes": head("Attach", 5) + b"\x01\xa1a" + listed(b"\x92\x01\x00", LONG),
    "gauges": head("Merged", 5) + b"\x01" + listed(
        msgpack.packb(["gauge", "a", [], [None, "sum", None]]), PIECE_BYTES // 8) + b"\x90",
    "meters": head("Merged", 5) + b"\x01" + listed(msgpack.packb(meter(RATES)), PIECE_BYTES // 8) + b"\x90",
    "counters": head("Merged", 5) + b"\x01" + listed(msgpack.packb(counter()), PIECE_BYTES // 8) + b"\x90",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_memory_is_bounded(what):
    """No message takes more memory than promised; most of these are refused, some are valid."""
    data = HOSTILE[what]
    took = memory_of(data)
    assert took <= BYTES_PER_BYTE * len(data) + (PIECE_MEMORY if what == "many pieces" else 1 << 20)


@pytest.mark.parametrize("filler", [b"\x91\xe0", b"\x80", b"\xc7\x00\x05"])
def test_a_piece_takes_bounded_memory(filler):
    """The most that is ever built at once of what is not checked yet; of maps and the like nothing is."""
    assert memory_of(START + listed(filler, PIECE_BYTES - 100)) <= PIECE_MEMORY


def memory_of(data):
    tracemalloc = pytest.importorskip("tracemalloc")  # which PyPy has not
    tracemalloc.start()
    with contextlib.suppress(WireError):
        _ = decode(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_what_is_real_takes_little_memory():
    """A keyframe is never unpacked as a whole: twice its length is for the states."""
    registry = tapes.Registry(clock=ManualClock(1000.0))
    for number in range(300):
        timer = registry.timer("t", n=number)
        for step in range(150):
            timer.update(1.05**step)
    data = encode(Merged(1, [Item(*series) for series in registry.collect()], {}))
    assert memory_of(data) < 3 * len(data)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01"])
@pytest.mark.parametrize("depth", [100, 1000, 100_000])
def test_depth_is_bounded(opening, depth):
    """Nesting never reaches the limits of the stack."""
    nest = opening * depth + b"\xc0"
    for start in (b"", head("Reply", 5), START, START + b"\x94\xa7counter\xa1c"):
        with pytest.raises(WireError):
            decode(start + nest)


def test_descriptions_may_have_any_length():
    """Their length has no bound but that of the message."""
    registry = tapes.Registry()
    long = "é" * PIECE_BYTES
    registry.counter("a", label=long).increment()
    registry.describe("d", long, unit=long)
    items = [Item(*series) for series in registry.collect()]
    update = Update(b"1" * 16, Process(1, 0), long, 1, 0, items, registry.descriptions())
    assert decode(encode(update)) == update


def test_a_message_has_a_longest_length_and_an_answer_has_none(monkeypatch):
    """A message that is too long is refused by both sides; a reply may have any length."""
    monkeypatch.setattr(wire, "MAX_BYTES", 1000)
    assert decode(encode(Reply(1, "ok", bytes(2000)))).payload == bytes(2000)
    with pytest.raises(WireError, match="too long to be sent"):
        encode(Attach(1, "h" * 1000, ()))
    with pytest.raises(WireError, match="length"):
        decode(bytes(1001))


def test_a_long_answer_is_sent_in_frames(monkeypatch):
    """A long reply is sent in frames of bounded length, which make up the reply."""
    monkeypatch.setattr(wire, "_FRAME_BYTES", 1000)
    for length in (0, 500, 990, 2000, 10_000):
        answer = encode(Reply(1, "ok", b"x" * length))
        frames = wire.frames(answer)
        assert max(map(len, frames)) <= 1000
        assert len(frames) == -(-len(answer) // 1000)
        assert b"".join(frames) == answer


def test_a_refusal_is_short():
    """It is logged; what a stranger sent must not fill the log."""
    for name in ("x" * 10**6, "9" * 10**6):
        for tree in ([VERSION, name, 1], [name, "Reply", 1], [VERSION, "Update", name]):
            with pytest.raises(WireError) as refused:
                decode(msgpack.packb(tree))
            assert len(str(refused.value)) < 1000


def test_time_is_in_proportion_to_length():
    """Texts that are hard to read, and a million small values."""
    for data in (
        head("Attach", 5)
        + b"\x01\xdb"
        + (3 << 20).to_bytes(4, "big")
        + b"\xed\xa0\x80" * (1 << 20)
        + b"\x90",
        head("Attach", 5) + b"\x01\xa1a" + listed(b"\x92\x01\x00", 3 << 16),
    ):
        started = time.process_time()
        decode(data)
        assert time.process_time() - started < 5.0


# What has another form than ours is refused, with the reason.

MOST = 1.7976931348623157e308
REFUSED = {
    "rates that overflow when added": meter(changed(RATES, 2, [1e308, 0.0, 0.0])),
    "events that overflow when added": meter(changed(RATES, 1, 1e308)),
    "negative events": meter(changed(RATES, 1, -1.0)),
    "a first count that overflows": meter(changed(RATES, 4, 2.0**81)),
    "a first tick still to come": meter(changed(RATES, 3, TICK + 2)),
    "weights beyond the count": histogram(changed(SKETCH, 7, [1e308, 1e308])),
    "a weight beyond the count": histogram(changed(SKETCH, 7, [1.5, 1.0])),
    "weights that are not finite": histogram(changed(SKETCH, 7, [float("nan"), 1.0])),
    "a sum that is none": histogram(changed(SKETCH, 1, [1.0, 3.0])),
    "too many parts of a sum": histogram(changed(SKETCH, 1, [3.0] + [0.0] * 64)),
    "an infinite sum": histogram(changed(SKETCH, 8, float("inf"))),
    "a tick beyond all numbers": histogram(changed(SKETCH, 6, 2**64 - 1)),
    "no values, but bins": histogram([0, [], 0.0, 0.0, [1], [1], 0, [1.0], 0.0]),
    "a negative bin of times": timer([1, [-1.0], -1.0, 1.0, [-0x3F80], [1], TICK, [1.0], -1.0]),
    "a negative time": timer([1, [1.0], -1.0, 1.0, [0x3F80], [1], TICK, [1.0], 1.0]),
    "a count below zero": counter([0, [-5.0]]),
    "a number that is too long": counter(["9" * 32, []]),
    "a number with a sign": counter(["-5", []]),
    "a beginning before 1970": counter(origin=[0.0, 0]),
    "a label like an operator": counter(labels=[["a-b", "x"]]),
    "a label for nobody": counter(labels=[["__name__", "x"]]),
    "a label twice": counter(labels=[["a", "x"], ["a", "y"]]),
    "labels out of order": counter(labels=[["b", "x"], ["a", "y"]]),
    "labels as texts": counter(labels=["ab"]),
    "a label that is a number": counter(labels=[["a", 1]]),
    "a name with an empty segment": counter(name="a..b"),
    "a name like a label": counter(name='a.{b="c"}'),
    "a name of two lines": counter(name="a\n# EOF"),
    "a name with half a character": counter(name="a\ud800"),
    "a name deeper than recursion goes": counter(name="a." * 400 + "b"),
    "a kind of no metric": ["summary", "c", [], []],
    "another kind's state": ["gauge", *counter()[1:]],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_do_harm_is_refused(what):
    """Each of these made a reader fail, an exposition invalid, or a sum infinite."""
    with pytest.raises(WireError):
        decoded(REFUSED[what])


def test_nothing_may_follow():
    """What is behind a message, or a field too many, makes it another one."""
    for data in (encode(Reply(1, "ok", b"")) + b"\xc0", msgpack.packb([VERSION, "Reply", 1, "ok", b"", 1])):
        with pytest.raises(WireError):
            decode(data)


@pytest.mark.parametrize("version", [True, 2.0, "2", b"2", None, [2], 2**64 - 1])
def test_a_version_is_a_whole_number(version):
    """What only equals a version is none."""
    with pytest.raises(WireError):
        decode(msgpack.packb([version, "Reply", 1, "ok", b""]))


@pytest.mark.parametrize("kind", ["counter", "gauge"])
def test_no_worker_replaces_the_aggregators_own_metrics(kind):
    """Whatever its identity, it adds to a metric of the same kind, and another kind is left out."""
    stranger, own = tapes.Registry(), tapes.Registry()
    if kind == "counter":
        stranger.own(tapes.metrics.Counter, "tapes.messages").increment(7)
    else:
        stranger.own(tapes.metrics.Gauge, "tapes.messages").set(7)
    own.own(tapes.metrics.Counter, "tapes.messages").increment(3)
    items = [Item(*series) for series in stranger.collect()]
    ledger = Ledger()
    ledger.apply(Update(bytes(16), Process(1, 0), "", 5, 0, items, {}))
    mine = [Item(*series) for series in own.collect()]
    assert ledger.snapshot(300, mine).get("tapes.messages").value == (10 if kind == "counter" else 3)
    ledger.retire(bytes(16))
    assert ledger.snapshot(300, mine).get("tapes.messages").value >= 3


def test_descriptions_obey_the_rules():
    """Their names and bounds are those that `describe()` takes."""
    for described in (
        ["a..b", "", None, []],
        ["a", "", None, [2.0, 1.0]],
        ["a", "", 5, []],
        ["a", "", None, [1]],
    ):
        with pytest.raises(WireError):
            decode(update_of(described=[described]))
    assert decode(update_of(described=[["a", "x", None, [1.0]]])).descriptions == {
        "a": Description("x", None, (1.0,))
    }


# What is valid, however odd, does no harm.

ODD = {
    "counts that fill the arrays": histogram(
        [2**63, [MOST], -MOST, MOST, [0], [2**63], 2**63 - 1, [9e18], MOST]
    ),
    "the largest numbers": counter(["9" * 31, [MOST]], [5e-324, MOST]),
    "told more than anything": counter(["9" * 31, []], [MOST, 2**64 - 1]),
    "told less than nothing": counter(origin=[float("inf"), -MOST]),
    "the latest tick": meter([2**63 - 1, 2.0**80, [2.0**80, 2.0**80, 2.0**80], 0, 2.0**80]),
    "the smallest weights": histogram(changed(SKETCH, 7, [5e-324, 0.0])),
    "extremes of other bins": histogram(changed(changed(SKETCH, 2, -MOST), 3, -1e308)),
    "a label that says le": ["histogram", "h", [["le", "\ud800\n\""]], [SKETCH, ORIGIN]],
    "a gauge beyond its numbers": ["gauge", "g", [["worker", "1"]], [2**64 - 1, "each", -MOST]],
    "a gauge at the largest number": ["gauge", "g", [], [MOST, "mean", None]],
    "another kind of the same name": ["meter", "c", [], [["9" * 31, [0.5]], RATES, ORIGIN]],
    "a field's name": counter(name="c.value"),
    "the deepest name": counter(name=".".join("a" * 32)),
    "names of dictionaries": counter(name="__frozen.__parent.freeze.items"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_what_is_valid_is_harmless(what, caplog):
    """It can be added to itself under other identities, to all others, read and sent on."""
    caplog.set_level("CRITICAL", "tapes")
    first, *more = (decoded(ODD[what], identity=bytes([n]) * 16) for n in (1, 2, 3))
    check_harmless(first, [])
    check_harmless(first, more)
    everything = [decoded(item, identity=bytes([n]) * 16) for n, item in enumerate(ODD.values(), 4)]
    check_harmless(first, everything)


def test_what_has_left_is_added_up_for_ever():
    """The total of those that left stays within what can be sent."""
    ledger = Ledger()
    for number in range(1, 12):
        update = decode(update_of(*list(ODD.values())[:5], identity=bytes([number]) * 16))
        ledger.apply(update)
        ledger.retire(update.identity)
    check_readable(ledger)


def test_totals_beyond_all_that_one_process_counts_are_exact():
    """Merged totals of 31 digits are added up exactly, and shown correctly rounded beside floats."""
    most = 10**31 - 1
    assert Total.merge([Total(most), Total(most)]).value == 2 * most
    assert Total.merge([Total(most), Total(1, (0.5,))]).value == 1e31
    assert Total.merge([Total(most), Total(0, (MOST,))]).value == MOST
    assert Total(2**53 + 1, (2.0,)).value == 2**53 + 3 + 1  # to even


def test_more_values_than_arrays_can_count():
    """The largest sketch stands; with one value less it is all of them."""
    many = EMPTY.fold([3.0], 0)
    for _ in range(63):
        many = Sketch.merge([many, many])
    assert many.count == 2**63
    one = EMPTY.fold([1.0], 0)
    assert Sketch.merge([many, one]).count == 2**63 + 1
    assert Sketch.merge([one, many, many]).count == 2**63


# What a registry takes comes through.

VALUES = [0, -0.0, 5e-324, 2.2e-308, 1e-30, 0.1, 1, 2**53 + 1, 2**63, 10**20, 1e30, 1e300, 1e308, MOST]


def test_whatever_a_registry_takes_comes_back_and_is_read_unchanged():
    """The numbers at all edges, and tens of thousands of events: the ledger shows what the registry does."""
    clock = ManualClock(1000.0)
    registry = tapes.Registry(clock=clock, labels={"shop": "\ud800\n"}, max_series=3)
    for number in range(20_000):
        value = VALUES[number % len(VALUES)]
        registry.counter("c", n=number % 5).increment(value)
        registry.counter("c").decrement(value)
        registry.meter("m").mark(value)
        registry.histogram("h").update(-value if number % 3 else value)
        registry.timer("t").update(value)
        registry.gauge("g").set(value)
        if not number % 2000:
            clock.advance(7)
    items = [Item(*series) for series in registry.collect()]
    update = Update(b"1" * 16, Process(1, 0), "h", 1, 0, items, {}, (), registry.max_series)
    assert decode(encode(update)) == update
    ledger = Ledger()
    ledger.apply(decode(encode(update)))
    assert ledger.snapshot(int(clock() // 5)).stats() == registry.get_stats()
    check_readable(ledger)


def test_any_number_of_label_sets_may_be_allowed():
    """More than the packing has numbers for is as good as the largest of them."""
    update = Update(b"1" * 16, Process(1, 0), "", 1, 0, [], {}, (), 10**30)
    assert decode(encode(update)).max_series == 2**63 - 1


def test_a_merged_total_beyond_2_to_the_64_is_sent_exactly():
    """Each worker counts less than 2^63; the total of five is sent in digits, and none is lost."""
    registry = tapes.Registry()
    for _ in range(1000):
        registry.counter("c").increment(2**53)
    (series,) = registry.collect()
    state = type(series[3]).merge([series[3]] * 5000)
    assert state.up.whole == 5_000_000 * 2**53 > 2**64
    (item,) = decode(encode(Merged(1, [Item(*series[:3], state)], {}))).items
    assert item.state.up == state.up


def test_a_process_is_not_asked_to_watch_the_world():
    """Each process of a greeting is watched, so there are not very many."""
    with pytest.raises(WireError, match="too long"):
        decode(encode(Attach(1, "h", tuple(Process(1, 0) for _ in range(70_000)))))
