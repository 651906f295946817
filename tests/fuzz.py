"""Messages that nobody of ours would send, by the million: `make fuzz`.

Every message is made by a seeded generator that knows how messages are built: valid ones of real registries,
those with bytes or parts of them changed, and well-formed ones with numbers and texts at the edges of what is
allowed. Of each it is checked that `decode` returns a message or raises `WireError`, and of what it returns
that it does no harm: a ledger takes it in, adds it to others, and what is read of it can be written and sent.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import random
import re
import resource
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import msgpack

import tapes
from tapes.distributed.aggregator.entries import Source
from tapes.distributed.aggregator.ledger import Ledger
from tapes.distributed.protocol import messages as said
from tapes.distributed.protocol.messages import Item, Merged, Message, Read, Record, Update
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.errors import WireError
from tapes.exposition import FORMS, write
from tapes.metrics import MERGE_MODES
from tapes.metrics.origin import Origin
from tapes.processes import Process
from tapes.snapshot import Description
from tapes.testing import ManualClock

TICK = 300
MAX_SECONDS = 5.0
"""So long one message may take, with all that is done with it; the longest have 5 MB."""
_LARGE = 5 << 20
_LARGE_EVERY = 40_000
_NOT_FINITE = re.compile(rb"^[^#\n].* [-+]?(inf|nan)$", re.MULTILINE | re.IGNORECASE)

WHOLES = (
    0, 1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
    2**64 - 1, -1, -32, -33, -128, -(2**31), -(2**63),
)  # fmt: skip
FLOATS = (
    0.0, -0.0, 5e-324, 1e-308, 1e-15, 0.5, 1.0, 1e9, 1e30, 3.4e38, 1e299, 1e300, 1.1e300, 1e308,
    1.7976931348623157e308, -1e-300, -1.0, -1e308, -1.7976931348623157e308, float("inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", "a", "a.b", ".", "a..b", "a.", "{a}", "a.{b}", "\n", 'x"} 1', "\\", "\ud800", "é", "\x00", "le",
    "__a", "worker", "overflow", "true", "1a", "a-b", "__frozen", "value.count", "counter", "gauge", "each",
    "9" * 30, "9" * 31, "9" * 32, "-1", "x" * 5000, "x" * 1024, "x" * 1025, "a." * 31 + "a",
    "a." * 32 + "a", "c.value", "m.m1",
)  # fmt: skip
KEYS = (-0x7F7F, -0x4000, -1, 0, 1, 2, 0x3F80, 0x4000, 0x7F00, 0x7F7F)


class Counts(NamedTuple):
    """How many messages there were, and how many of them were messages."""

    generated: int
    valid: int
    refused: int


class Generator:
    """Makes messages; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._valid = [encode(message) for _ in range(40) for message in self._messages()]
        self._ways = (
            (self._any, 2), (self._flipped, 22), (self._cut, 6), (self._stretched, 6),
            (self._rebuilt, 40), (self._crafted, 15), (self._nested, 3), (self._announced, 4),
            (self._strange, 3),
        )  # fmt: skip

    def __iter__(self) -> Iterator[bytes]:
        ways, weights = zip(*self._ways)
        number = 0
        while True:
            for way in self._random.choices(ways, weights, k=1000):
                number += 1
                yield self._large() if number % _LARGE_EVERY == 0 else way()

    def _messages(self) -> Iterator[Message]:
        update, rng = self._update(), self._random
        processes = tuple(Process(rng.randint(1, 9999), rng.randint(0, 10**6)) for _ in range(2))
        yield update
        yield update._replace(ancestors=(self._update(),))
        yield rng.choice((
            Read(1, rng.choice([*FORMS, "states"]), update),
            said.Goodbye(2, update),
            Merged(TICK, update.items, update.descriptions),
            Record(update, rng.random() < 0.5, rng.randint(0, 2),
                   (update.identity,), tuple(range(len(update.items)))),
            said.Retired(update.items),
            said.Cursor("statsd udp localhost", tuple(
                said.SentCount(item.name, item.labels, rng.choice((None, (1, 2.5, 10**25))))
                for item in update.items
            )),
        ))  # fmt: skip
        yield rng.choice((
            said.Attach(3, "host", processes), said.HandOver(4, 9), said.Reply(5, "ok", b"payload"),
            said.Flush(6),
            said.Journal("host", processes, (("TAPES_HTTP", "1"),), 3, (update.identity,), {}, 99),
        ))  # fmt: skip

    def _update(self) -> Update:
        rng = self._random
        clock = ManualClock(rng.randint(0, 1400))
        registry = tapes.Registry(clock=clock)
        label, mode = rng.choice(("", "a", "\ud800")), rng.choice(MERGE_MODES)
        makers: list[Any] = [
            lambda n: registry.counter("c", l=label).increment(abs(n)),
            lambda n: registry.counter("c").decrement(abs(n)),
            lambda n: registry.meter("m").mark(abs(n)),
            lambda n: registry.histogram("h", l=label).update(n),
            lambda n: registry.timer("t.t").update(abs(n)),
            lambda n: registry.gauge("g", merge=mode).set(n),
            lambda n: registry.counter("x").increment(),
        ]
        if rng.random() < 0.2:
            makers[-1] = lambda n: registry.meter("x").mark()
        for make in rng.sample(makers, rng.randint(1, 3)):
            for _ in range(rng.randint(1, 5)):
                make(rng.choice((1, 2, 0.1, 7.5, 300, -4, 0.0, 10**20, 1e300, 5e-324)))
                clock.advance(rng.choice((0, 0, 5, 70)))
        items = [
            Item(kind, name, labels, state if kind == "gauge" else state._replace(origin=Origin(1.7e9)))
            for kind, name, labels, state in registry.collect()
        ]
        base = rng.choice((0, 0, 4))
        described = {} if base else {"h": Description("How much.", "bytes", (1.0, 2.5))}
        return Update(
            rng.randbytes(16), Process(rng.randint(1, 9999), 7), "host", base + rng.randint(1, 9), base,
            items, described, (), rng.choice((1, 2000)),
        )  # fmt: skip

    def _any(self) -> bytes:
        return self._random.choice(self._valid)

    def _flipped(self) -> bytes:
        data, rng = bytearray(self._any()), self._random
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0xC0, 0xCB, 0x90, 0xDD, 0xFF))
        return bytes(data)

    def _cut(self) -> bytes:
        data, rng = self._any(), self._random
        start = rng.randrange(len(data))
        return data[:start] + data[start + rng.randint(1, 9) :] if rng.random() < 0.5 else data[:start]

    def _stretched(self) -> bytes:
        data, rng = self._any(), self._random
        start, other = rng.randrange(len(data)), self._any()
        begin = rng.randrange(len(other))
        return data[:start] + other[begin : begin + rng.randint(1, 30)] + data[start:]

    def _rebuilt(self) -> bytes:
        tree = unpacked(self._any())
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            parent, index = self._place(tree)
            self._change(parent, index)
        return packed(tree)

    def _place(self, tree: list[Any]) -> tuple[list[Any], int]:
        rng = self._random
        parent, index = tree, rng.randrange(len(tree))
        while rng.random() < 0.9:
            lists = [place for place, node in enumerate(parent) if isinstance(node, list) and node]
            if isinstance(parent[index], list) and parent[index]:
                parent = parent[index]
            elif lists and rng.random() < 0.6:
                parent = parent[rng.choice(lists)]
            else:
                break
            index = rng.randrange(len(parent))
        return parent, index

    def _change(self, parent: list[Any], index: int) -> None:
        rng, value = self._random, parent[index]
        how = rng.randrange(10)
        if how == 0:
            del parent[index]
            parent or parent.append(self._edge())
        elif how == 1:
            parent.insert(index, value)
        elif how == 2:
            other = rng.randrange(len(parent))
            parent[index], parent[other] = parent[other], value
        elif how == 3:
            others, place = self._place(unpacked(self._any()))
            parent[index] = others[place]
        elif how == 4 and isinstance(value, list):
            parent[index] = value * rng.choice((0, 2, 50))
        elif how == 5 and type(value) in (int, float):
            changed = rng.choice((-value, value + 1, value - 1, value * 2, float(value)))
            parent[index] = changed if type(changed) is float or -(2**63) <= changed < 2**64 else value
        elif how == 6:
            parent[index] = rng.choice(([], {}, {"a": 1}, None, True, b"", [value], msgpack.ExtType(5, b"")))
        elif type(value) in (int, float, str):
            parent[index] = rng.choice({int: WHOLES, float: FLOATS, str: TEXTS}[type(value)])
        else:
            parent[index] = self._edge()

    def _edge(self) -> Any:
        return self._random.choice(self._random.choice((WHOLES, FLOATS, TEXTS)))

    # Well-formed ones, of numbers and texts that are odd.

    def _crafted(self) -> bytes:
        rng = self._random
        items = [self._item() for _ in range(rng.randint(1, 3))]
        seq = rng.choice((1, 5, 2**63 - 1))
        return packed([
            VERSION, "Update", rng.randbytes(16), [rng.randint(1, 3), 0], "h", seq, rng.choice((0, seq - 1)),
            items, [["h", rng.choice(TEXTS), rng.choice(TEXTS), sorted(rng.sample(FLOATS[:18], 3))]], [], 1,
        ])  # fmt: skip

    def _item(self) -> list[Any]:
        rng = self._random
        kind, name, state = rng.choice((
            ("counter", "c", lambda: [self._total(), self._total(), self._origin()]),
            ("gauge", "g", lambda: [rng.choice((self._number(), None)), rng.choice(MERGE_MODES),
                                    rng.choice((None, self._float(), 5))]),
            ("meter", "m", lambda: [self._total(), self._rates(), self._origin()]),
            ("histogram", "h", lambda: [self._sketch(KEYS), self._origin()]),
            ("timer", "t.t", lambda: [self._sketch(KEYS[3:]), self._rates(), self._origin()]),
        ))  # fmt: skip
        if rng.random() < 0.1:
            name = rng.choice(TEXTS)
        names = rng.sample(("a", "l", "le", "overflow", "worker"), rng.choice((0, 0, 0, 1, 2)))
        return [kind, name, [[label, rng.choice(TEXTS)] for label in sorted(names)], state()]

    def _float(self, least: float = -1e999) -> float:
        rng = self._random
        if rng.random() < 0.02:
            return rng.choice(FLOATS)
        return rng.choice([number for number in FLOATS[:-2] if number >= least])

    def _number(self) -> Any:
        return self._random.choice((self._random.choice(WHOLES), self._float()))

    def _total(self) -> list[Any]:
        rng = self._random
        whole = rng.choice((0, 1, 2**63, "9" * 31, "9" * 30))
        return [whole, rng.choice(([], [], [], [self._float(0.0)], [1e308, 1.0], [0.1, 1e-18]))]

    def _origin(self) -> list[Any]:
        return [self._random.choice((5e-324, 1.7e9, 1e308, float("inf"))), self._number()]

    def _rates(self) -> list[Any]:
        tick = self._random.choice((0, 299, 301, 2**62, 2**63 - 1))
        first = self._random.choice((0, 1, tick, tick + 1))
        pending, m1, m5, m15, first_count = (min(self._float(0.0), 2.0**80) for _ in range(5))
        return [tick, pending, [m1, m5, m15], first, first_count]

    def _sketch(self, keys: tuple[int, ...]) -> list[Any]:
        rng = self._random
        if rng.random() < 0.05:
            return [0, [], 0.0, 0.0, [], [], 0, [], 0.0]
        some = sorted(rng.sample(keys, rng.randint(1, 3)))
        counts = [rng.choice((1, 2, 70_000, 2**33, 2**62)) for _ in some]
        weights = [rng.choice((0.0, 5e-324, 1e-15, 0.5, 1.0, float(count))) for count in counts]
        low, high = sorted(self._float(0.0 if keys[0] == 0 else -1e999) for _ in range(2))
        parts = rng.choice(([], [self._float()], [1e308, -1.0]))
        tick = rng.choice((0, 299, 301, 2**62, 2**63 - 1))
        return [sum(counts), parts, low, high, some, counts, tick, weights, self._float()]

    # Those that are after memory, or the stack.

    def _nested(self) -> bytes:
        depth = self._random.choice((3, 20, 500, 1023, 1024, 5000))
        opening = self._random.choice(
            (b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01", b"\xdd\x7f\xff\xff\xff")
        )
        return self._with(opening * depth + b"\xc0")

    def _announced(self) -> bytes:
        kind = self._random.choice((b"\xdd", b"\xdc", b"\xdb", b"\xc6", b"\xdf", b"\xc9", b"\xda"))
        return self._with(kind + self._random.choice((b"\x00\xff\xff\xff", b"\xff" * 4, b"\x7f" * 4)))

    def _with(self, junk: bytes) -> bytes:
        """Return a message with ``junk`` in the place of something."""
        tree = unpacked(self._any())
        parent, index = self._place(tree)
        parent[index] = mark = "\x01the place\x01"
        before, _, after = packed(tree).partition(packed(mark))
        return before + junk + after

    def _strange(self) -> bytes:
        rng = self._random
        return rng.choice((rng.randbytes(rng.randint(0, 60)), pickle.dumps({"a": [1.5]}), b"", b"\x90"))

    def _large(self) -> bytes:
        rng = self._random
        filler = rng.choice(
            (b"\x90", b"\x80", b"\xe0", b"\x91\xe0", b"\xa2ab", b"\xed\xa0\x80", b"\x92\x01\x00")
        )
        size = _LARGE // len(filler)
        lists = b"\xdd" + size.to_bytes(4, "big") + filler * size
        text = b"\xdb" + (size * len(filler)).to_bytes(4, "big") + filler * size
        return self._with(rng.choice((lists, text)))


def packed(tree: Any) -> bytes:
    data: bytes = msgpack.packb(tree, unicode_errors="surrogatepass")
    return data


def unpacked(data: bytes) -> list[Any]:
    tree: list[Any] = msgpack.unpackb(data, unicode_errors="surrogatepass")
    return tree


def check_harmless(update: Update, others: list[Update]) -> None:
    """Have a ledger take ``update`` in, twice, with ``others``, and read it; then let it leave."""
    ledger = Ledger()
    ledger.apply(update, Source.READ)
    ledger.apply(update)
    for other in others:
        ledger.apply(other)
    check_readable(ledger)
    ledger.retire(update.identity)
    encode(ledger.merged(TICK))


def check_readable(ledger: Ledger) -> None:
    """Read everything, in every form."""
    assert isinstance(decode(encode(ledger.merged(TICK))), Merged)
    snapshot = ledger.snapshot(TICK)
    snapshot.stats()
    for form in FORMS:
        shown = write(snapshot, form)
        infinite = form != "json" and _NOT_FINITE.search(shown)
        assert not infinite, infinite


def check(data: bytes, others: list[Update]) -> bool:
    """Check all that holds of any bytes; return whether they are a message.

    Updates are noted in ``others``, to be added to the next; once there are a few, it begins anew.
    """
    try:
        message = decode(data)
    except WireError as refusal:
        why = str(refusal)
        if len(why) < 1000:  # or a log is flooded
            return False
        raise
    again = decode(encode(message))
    assert type(again) is type(message)
    update = getattr(message, "update", message)
    if isinstance(update, Update):
        check_harmless(update, others)
        others.append(update)
        del others[: len(others) // 4 * 4]
    elif isinstance(update, Merged):
        check_harmless(Update(b"m" * 16, Process(1, 0), "", 1, 0, *update[1:]), others)
    return True


def fuzz(messages: int, seed: int = 0) -> Counts:
    """Check so many messages; raises `AssertionError` with the first that breaks something."""
    others: list[Update] = []
    valid = 0
    for data in islice(Generator(seed), messages):
        started = time.process_time()
        try:
            valid += check(data, others)
            took = time.process_time() - started
            assert took < MAX_SECONDS, f"it took {took:.1f} s"
        except Exception as error:
            shown = data.hex() if len(data) < 5000 else data[:200].hex() + "…"
            raise AssertionError(f"{type(error).__name__}: {error}; after {others}; by {shown}") from error
    return Counts(messages, valid, messages - valid)


def main() -> None:
    """Say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("tapes").addHandler(logging.NullHandler())
    logging.getLogger("tapes").propagate = False
    started = time.monotonic()
    counts = fuzz(arguments.messages, arguments.seed)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{counts.generated:,} messages: {counts.valid:,} valid and harmless, {counts.refused:,} refused, "
        f"in {time.monotonic() - started:.0f} s; {megabytes:.0f} MB at most"
    )


if __name__ == "__main__":
    main()
