"""The wire: messages (`tapes.distributed.protocol.messages`) to bytes and back, with no I/O.

A message is one MessagePack array: wire version, type, fields.

Versions. A release reads its own version and the one before, so the workers of the release before it go on.
An older aggregator refuses messages that it can't read. A newer worker then asks it to hand over; the layouts
of that message and of its reply never change (`HandOver`, `Reply`). If you change another layout, or add a
kind of metric or a merge mode, raise `VERSION`, have the decoder read the layout before, and answer each
request in its own version.

    1   the first

`decode` returns a valid message or raises `WireError`, whatever it is given: every field is checked for type
and range, and fields that depend on each other must agree (the counts of a sketch's bins add up to its
count). Time and memory are bounded; see `tapes.distributed.protocol.unpacker`.

Totals of many workers may exceed the integers of MessagePack; larger ones are sent as decimal text.

Source: MessagePack (msgpack.org); all fields are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgpack

from tapes.distributed.protocol.decoding import MAX_DIGITS, MAX_EVENTS, MAX_INT, STATES, decoded
from tapes.distributed.protocol.messages import HandOver, Merged, Message, Reply, SentCount
from tapes.distributed.protocol.unpacker import Unpacker
from tapes.errors import WireError, safe_text
from tapes.ewma import Rates
from tapes.metrics import KINDS, GaugeState
from tapes.metrics.origin import Origin
from tapes.sketch import Sketch
from tapes.sums import Number, Total

VERSION = 1
READABLE = range(max(1, VERSION - 1), VERSION + 1)
"""The versions that this release reads: its own and the one before."""
MAX_BYTES = 64 << 20
"""Maximum bytes of a message from a worker, and of a frame; the socket drops a longer one."""
_FRAME_BYTES = 32 << 20

_REPLY = b"\xa5Reply"  # a reply's bytes from the third on: the type
_REPLY_HEAD = 64  # bytes of a reply that contain all fields but its payload
_MAX_FLOAT = sys.float_info.max
_MAX_TOTAL = 10**MAX_DIGITS - 1


def encode(message: Message) -> bytes:
    """Return ``message`` as bytes; raises `WireError` if it is longer than `MAX_BYTES` and no answer."""
    name = type(message).__name__
    fields = [VERSION, name, *(_plain_field(value) for value in message)]
    packed: bytes = msgpack.packb(fields, unicode_errors="surrogatepass")
    if len(packed) > MAX_BYTES and not isinstance(message, (Reply, Merged)):
        raise WireError(
            f"the {name} is too long to be sent", got=len(packed), expected=f"{MAX_BYTES} bytes at most",
            remedy="record fewer series, or with shorter labels",
        )  # fmt: skip
    return packed


def frames(answer: bytes) -> list[bytes | memoryview]:
    """Return the frames in which an answer is sent: one, unless it is long."""
    if len(answer) <= _FRAME_BYTES:
        return [answer]
    view = memoryview(answer)
    return [view[start : start + _FRAME_BYTES] for start in range(0, len(answer), _FRAME_BYTES)]


def decode(data: bytes | memoryview, *, most: float | None = None) -> Message:
    """Return the message in ``data``; raises `WireError` if it is not one of ours.

    A message that is not a reply has ``most`` bytes at most; `MAX_BYTES` by default.
    """
    try:
        if data[2 : 2 + len(_REPLY)] == _REPLY:
            return _reply(data)
        limit = MAX_BYTES if most is None else most
        if len(data) > limit:
            raise WireError("a message's length", got=len(data), expected=f"{limit} bytes at most")
        read = Unpacker(bytes(data))
        fields, version, name = read.count() - 2, read.flat(), read.flat()
        if name != HandOver.__name__ and (type(version) is not int or version not in READABLE):
            raise WireError("the message's version", got=version, expected=" or ".join(map(str, READABLE)))
        return decoded(name, fields, read)
    except WireError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {safe_text(error)[:200]}"
        raise WireError(f"the message can't be read ({why})") from None


def _reply(data: bytes | memoryview) -> Reply:
    """Return the reply in ``data``; its payload may be long, so it is cut out as a whole."""
    head = msgpack.Unpacker(max_buffer_size=_REPLY_HEAD)
    head.feed(data[:_REPLY_HEAD])
    fields, version, _, correlation, status = head.read_array_header(), *(head.unpack() for _ in range(4))
    start = head.tell()
    lengths = {0xC4: 1, 0xC5: 2, 0xC6: 4}
    payload = start + 1 + lengths[data[start]]
    length = int.from_bytes(data[start + 1 : payload], "big")
    sane = type(version) is int and type(correlation) is int and correlation >= 0 and type(status) is str
    if fields != 5 or not sane or payload + length != len(data):
        raise WireError("a reply of wrong fields")
    return Reply(correlation, status, bytes(data[payload:]))


# Encoding: each function returns a part of a message as values that MessagePack knows.


def _plain_field(value: Any) -> Any:
    if isinstance(value, SentCount):
        return [*value[:2], None if value.sent is None else list(map(_plain_number, value.sent))]
    if isinstance(value, tuple):
        return [_plain_field(field) for field in value]
    if isinstance(value, list):
        return [[item.kind, item.name, item.labels, _PLAIN[item.kind](item.state)] for item in value]
    if isinstance(value, dict):
        return [[name, *described] for name, described in value.items()]
    if type(value) is int:
        return min(value, MAX_INT)  # a registry may allow any number of label sets
    return value


def _plain_number(number: Number) -> Number | str:
    """Return an integer that is too large for MessagePack as text, which keeps it exact."""
    if type(number) is float or -MAX_INT <= number <= MAX_INT:
        return number
    return str(max(-_MAX_TOTAL, min(number, _MAX_TOTAL)))  # more is no honest count


def _plain_origin(origin: Origin) -> list[Any]:
    return [origin.created, _plain_number(origin.baseline)]


def _plain_total(total: Total) -> list[Any]:
    return [_plain_number(total.whole), list(total.parts)]


def _plain_gauge(state: GaugeState) -> list[Any]:
    value = state.value
    if value is not None and not -MAX_INT <= value <= MAX_INT:
        value = float(max(-_MAX_FLOAT, min(value, _MAX_FLOAT)))  # the nearest float
    return [value, *state[1:]]


def _plain_rates(rates: Rates) -> list[Any]:
    pending, *linear, first_count = (
        min(events, MAX_EVENTS) for events in (rates.pending, *rates.linear, rates.first_count)
    )
    return [rates.tick, pending, linear, rates.first, first_count]


def _plain_sketch(sketch: Sketch) -> list[Any]:
    compacted = sketch.compacted()
    return [
        compacted.count, compacted.sum_parts, compacted.low, compacted.high, compacted.keys.tolist(),
        compacted.counts.tolist(), compacted.tick, compacted.weights.tolist(), compacted.recent_sum,
    ]  # fmt: skip


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "counter": lambda state: [_plain_total(state.up), _plain_total(state.down), _plain_origin(state.origin)],
    "gauge": _plain_gauge,
    "meter": lambda state: [
        _plain_total(state.count),
        _plain_rates(state.rates),
        _plain_origin(state.origin),
    ],
    "histogram": lambda state: [_plain_sketch(state.sketch), _plain_origin(state.origin)],
    "timer": lambda state: [
        _plain_sketch(state.sketch),
        _plain_rates(state.rates),
        _plain_origin(state.origin),
    ],
}
assert _PLAIN.keys() == STATES.keys() == KINDS.keys()
