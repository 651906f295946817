"""The wire: messages (`tapes.distributed.protocol.messages`) to bytes and back, with no I/O.

A message is one MessagePack array: wire version, type, fields.

Versions. A release reads its own version and the one before, and answers in the version that it was asked in,
so the workers of the release before it go on. What an older aggregator can't read is refused; a newer worker
asks it to hand over, by a message whose layout is the same in every version, as that of its answer is
(`HandOver`, `Reply`). Who changes another layout raises `VERSION`, and has the decoder read the former one.

    1   the first
    2   HandOver, Journal and Record are new; an Update ends with its program; all else is as in 1. An
        aggregator that does not know Flush refuses it, which the sender ignores

`decode` returns a valid message or raises `WireError`, whatever it is given: every field is checked for type
and range, and what belongs together must agree (the counts of a sketch's bins add up to its count). Time and
memory are bounded; `tapes.distributed.protocol.unpacker` says how.

Source: MessagePack (msgpack.org); all fields are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgpack

from tapes.distributed.protocol.decoding import MAX_DIGITS, MAX_EVENTS, MAX_WHOLE, STATES, decoded
from tapes.distributed.protocol.messages import HandOver, Merged, Message, Reply
from tapes.distributed.protocol.unpacker import Unpacker
from tapes.errors import WireError, safe_text
from tapes.ewma import Rates
from tapes.metrics import KINDS, GaugeState
from tapes.metrics.origin import Origin
from tapes.sketch import Sketch
from tapes.sums import Number, Total

__all__ = ["MAX_BYTES", "VERSION", "decode", "encode", "frames", "version_to_answer"]

VERSION = 2
MAX_BYTES = 64 << 20
"""Maximum bytes of a message from a worker, and of a frame; the socket drops a longer one."""
_FRAME_BYTES = 32 << 20

_REPLY, _REPLY_HEAD = b"\xa5Reply", 64
"""What a reply has after its first two bytes; and how many of them are enough for all but its payload."""
_MAX_FLOAT = sys.float_info.max
_MAX_TOTAL = 10**MAX_DIGITS - 1


def encode(message: Message, version: int | None = None) -> bytes:
    """Return ``message`` as bytes, for who speaks ``version``; by default `VERSION`.

    Raises:
        WireError: If that is longer than `MAX_BYTES`; an answer has no limit.
    """
    name = type(message).__name__
    fields = [_plain_field(value) for value in message]
    head = [VERSION if version is None else version, name]
    packed: bytes = msgpack.packb(head + fields, unicode_errors="surrogatepass")
    if len(packed) > MAX_BYTES and not isinstance(message, (Reply, Merged)):
        raise WireError(
            f"the {name} is too long to be sent",
            got=len(packed),
            expected=f"{MAX_BYTES} bytes at most",
            remedy="record fewer series, or with shorter labels",
        )
    return packed


def frames(answer: bytes) -> list[bytes | memoryview]:
    """Return the frames in which an answer is sent: one, unless it is long."""
    if len(answer) <= _FRAME_BYTES:
        return [answer]
    view = memoryview(answer)
    return [view[start : start + _FRAME_BYTES] for start in range(0, len(answer), _FRAME_BYTES)]


def version_to_answer(question: bytes) -> int:
    """Return the version in which who sent ``question`` understands an answer."""
    return VERSION - 1 if question[1:2] == bytes([VERSION - 1]) else VERSION


def decode(data: bytes | memoryview, *, most: float | None = None) -> Message:
    """Return the message in ``data``.

    Args:
        data: One message.
        most: Maximum bytes of a message that is no reply; `MAX_BYTES` by default.

    Raises:
        WireError: If it is not one of ours, of another version, or inconsistent.
    """
    try:
        if data[2 : 2 + len(_REPLY)] == _REPLY:
            return _reply(data)
        limit = MAX_BYTES if most is None else most
        if len(data) > limit:
            raise WireError("a message's length", got=len(data), expected=f"{limit} bytes at most")
        read = Unpacker(bytes(data))
        fields, version, name = read.count() - 2, read.flat(), read.flat()
        if name != HandOver.__name__ and (type(version) is not int or version not in (VERSION, VERSION - 1)):
            raise WireError("the message's version", got=version, expected=f"{VERSION - 1} or {VERSION}")
        return decoded(name, fields, read)
    except WireError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {safe_text(error)[:200]}"
        raise WireError(f"the message can't be read ({why})") from None


def _reply(data: bytes | memoryview) -> Reply:
    """Return the reply in ``data``; what it carries may be long, so it is taken out as a whole."""
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


# Encoding: every part of a message as what MessagePack knows.


def _plain_field(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_field(field) for field in value]
    if isinstance(value, list):
        return [[item.kind, item.name, item.labels, _PLAIN[item.kind](item.state)] for item in value]
    if isinstance(value, dict):
        return [[name, *described] for name, described in value.items()]
    if type(value) is int and value > MAX_WHOLE:  # somebody allows any number of label sets
        return MAX_WHOLE
    return value


def _fits(whole: int) -> bool:
    """Return whether MessagePack has integers so large."""
    return -(1 << 63) <= whole < 1 << 63


def _plain_number(number: Number) -> Number:
    """Return what does not fit as the float that is nearest to it."""
    if type(number) is float or _fits(int(number)):
        return number
    return float(max(-_MAX_FLOAT, min(number, _MAX_FLOAT)))


def _plain_origin(origin: Origin) -> list[Any]:
    return [origin.created, _plain_number(origin.told)]


def _plain_total(total: Total) -> list[Any]:
    whole = total.whole
    return [whole if _fits(whole) else str(min(whole, _MAX_TOTAL)), list(total.parts)]


def _plain_gauge(state: GaugeState) -> list[Any]:
    value = state.value
    return [None if value is None else _plain_number(value), *state[1:]]


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
