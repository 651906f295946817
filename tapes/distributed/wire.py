"""The wire: messages (`tapes.distributed.messages`) to bytes and back, with no I/O.

A message is one MessagePack array: wire version, type, fields.

Versions. A release reads its own version and the one before, and answers in the version that it was asked in,
so the workers of the release before it go on. What an older aggregator can't read is refused; a newer worker
asks it to hand over, by the one message whose layout is the same in every version (`HandOver`). Who changes a
layout raises `VERSION`, and has the functions here read the former layout too.

    1   the first
    2   HandOver, Journal and Record are new; all else is as in 1

`decode` returns a valid message or raises `WireError`, whatever it is given: every field is checked for type
and range, and what belongs together must agree (the counts of a sketch's bins add up to its count).

Source: MessagePack (msgpack.org); all fields are ours.
"""

from __future__ import annotations

from array import array
from math import isfinite
from operator import lt
from typing import Any, Callable

import msgpack

from tapes.bins import MAX_KEY
from tapes.distributed.messages import (
    Descriptions,
    Goodbye,
    HandOver,
    Hello,
    Item,
    Journal,
    Merged,
    Message,
    Read,
    Record,
    Reply,
    Update,
)
from tapes.errors import WireError
from tapes.ewma import Rates
from tapes.forks import Process
from tapes.metrics import (
    KINDS,
    MERGE_MODES,
    CounterState,
    GaugeState,
    HistogramState,
    MeterState,
    State,
    TimerState,
)
from tapes.metrics.origin import Origin
from tapes.naming import Labels
from tapes.sketch import EMPTY, Sketch, counts_array
from tapes.snapshot import Description
from tapes.sums import Number, Total

__all__ = ["MAX_BYTES", "VERSION", "decode", "encode", "version_to_answer"]

VERSION = 2
MAX_BYTES = 64 << 20
"""A longer message is dropped by the socket."""


def encode(message: Message, version: int | None = None) -> bytes:
    """Return ``message`` as bytes, for who speaks ``version``; by default `VERSION`."""
    name = type(message).__name__
    fields = [_plain_field(value) for value in message]
    head = [VERSION if version is None else version, name]
    packed: bytes = msgpack.packb(head + fields, unicode_errors="surrogatepass")
    return packed


def version_to_answer(question: bytes) -> int:
    """Return the version in which who sent ``question`` understands an answer."""
    return VERSION - 1 if question[1:2] == bytes([VERSION - 1]) else VERSION


def decode(data: bytes) -> Message:
    """Return the message in ``data``.

    Raises:
        WireError: If it is not one of ours, of another version, or inconsistent.
    """
    try:
        plain = msgpack.unpackb(data, max_map_len=0, max_ext_len=0, unicode_errors="surrogatepass")
        version, name, *fields = _list(plain)
        if version not in (VERSION, VERSION - 1) and name != HandOver.__name__:
            raise WireError("the message's version", got=version, expected=f"{VERSION - 1} or {VERSION}")
        return _MESSAGES[_text(name)](*fields)
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"the message can't be read ({type(error).__name__}: {error})") from None


# Encoding: every part of a message as what MessagePack knows.


def _plain_field(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_field(field) for field in value]
    if isinstance(value, list):
        return [[item.kind, item.name, item.labels, _PLAIN[item.kind](item.state)] for item in value]
    if isinstance(value, dict):
        return [[name, *described] for name, described in value.items()]
    return value


def _fits(whole: int) -> bool:
    """Return whether MessagePack has integers so large."""
    return -(1 << 63) <= whole < 1 << 63


def _plain_origin(origin: Origin) -> list[Any]:
    told = origin.told
    return [origin.created, told if type(told) is float or _fits(int(told)) else float(told)]


def _plain_total(total: Total) -> list[Any]:
    return [total.whole if _fits(total.whole) else str(total.whole), list(total.parts)]


def _plain_gauge(state: GaugeState) -> list[Any]:
    value = state.value
    return [float(value) if type(value) is int and not _fits(value) else value, *state[1:]]


def _plain_rates(rates: Rates) -> list[Any]:
    return [rates.tick, rates.pending, list(rates.linear), rates.first, rates.first_count]


def _plain_sketch(sketch: Sketch) -> list[Any]:
    settled = sketch.settled()
    return [
        settled.count, settled.sum_parts, settled.low, settled.high, settled.keys.tolist(),
        settled.counts.tolist(), settled.tick, settled.weights.tolist(), settled.recent_sum,
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


# Decoding: each function returns its part, or raises.


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise WireError(f"a message with {what}")


def _list(value: Any) -> list[Any]:
    _check(type(value) is list, "something that is no list")
    return value  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    _check(type(value) is str, "something that is no text")
    return value  # type: ignore[no-any-return]


def _bytes(value: Any) -> bytes:
    _check(type(value) is bytes, "something that is no bytes")
    return value  # type: ignore[no-any-return]


def _whole(value: Any, least: int = 0) -> int:
    _check(type(value) is int and value >= least, "a number out of range")
    return value  # type: ignore[no-any-return]


def _number(value: Any) -> Number:
    _check(type(value) is int or (type(value) is float and isfinite(value)), "no finite number")
    return value  # type: ignore[no-any-return]


def _float(value: Any, least: float = float("-inf")) -> float:
    number = float(_number(value))
    _check(number >= least, "a number out of range")
    return number


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(map(_float, _list(value)))


def _origin(plain: Any) -> Origin:
    created, told = _list(plain)
    _check(type(created) is float and created > 0, "no time of its making")  # infinite where nobody knows
    return Origin(created, _number(told))


def _total(plain: Any) -> Total:
    whole, parts = _list(plain)
    if type(whole) is str:
        _check(len(whole) <= 400, "a number too long")
        whole = int(whole)
    return Total(_whole(whole), _floats(parts))


def _rates(plain: Any) -> Rates:
    tick, pending, linear, first, first_count = _list(plain)
    rates = _floats(linear)
    _check(len(rates) == 3, "rates that are not three")
    return Rates(_whole(tick), _float(pending), rates, _whole(first), _float(first_count))


def _sketch(plain: Any) -> Sketch:
    count, parts, low, high, keys, counts, tick, weights, recent_sum = _list(plain)
    if _whole(count) == 0:
        return EMPTY
    _check({type(keys), type(counts), type(weights)} == {list}, "bins that are no lists")
    _check({*map(type, keys), *map(type, counts)} == {int}, "bins that are not whole numbers")
    _check(set(map(type, weights)) == {float}, "weights that are no numbers")
    _check(len(keys) == len(counts) == len(weights), "bins that do not match")
    _check(all(map(lt, keys, keys[1:])), "bins out of order")
    _check(keys[0] >= -MAX_KEY and keys[-1] <= MAX_KEY, "a bin out of range")
    _check(min(counts) > 0 and sum(counts) == count, "bins that do not add up to the count")
    _check(min(weights) >= 0.0 and isfinite(sum(weights)), "weights out of range")
    least, most = _float(low), _float(high)
    _check(least <= most, "a minimum above the maximum")
    return Sketch(
        count, _floats(parts), least, most, array("h", keys), counts_array(counts), _whole(tick),
        array("d", weights), _float(recent_sum),
    )  # fmt: skip


def _counter(plain: Any) -> CounterState:
    up, down, origin = _list(plain)
    return CounterState(_total(up), _total(down), _origin(origin))


def _gauge(plain: Any) -> GaugeState:
    value, mode, since = _list(plain)
    _check(mode in MERGE_MODES, "an unknown merge mode")
    return GaugeState(
        None if value is None else _number(value), mode, None if since is None else _float(since)
    )


def _meter(plain: Any) -> MeterState:
    count, rates, origin = _list(plain)
    return MeterState(_total(count), _rates(rates), _origin(origin))


def _histogram(plain: Any) -> HistogramState:
    sketch, origin = _list(plain)
    return HistogramState(_sketch(sketch), _origin(origin))


def _timer(plain: Any) -> TimerState:
    sketch, rates, origin = _list(plain)
    return TimerState(_sketch(sketch), _rates(rates), _origin(origin))


_STATES: dict[str, Callable[[Any], State]] = {
    "counter": _counter,
    "gauge": _gauge,
    "meter": _meter,
    "histogram": _histogram,
    "timer": _timer,
}
assert _STATES.keys() == _PLAIN.keys() == KINDS.keys()


def _identity(plain: Any) -> bytes:
    _check(len(_bytes(plain)) == 16, "an identity that is not sixteen bytes")
    return plain  # type: ignore[no-any-return]


def _pairs(plain: Any) -> tuple[tuple[str, str], ...]:
    return tuple((_text(name), _text(value)) for name, value in _list(plain))


def _labels(plain: Any) -> Labels:
    labels = _pairs(plain)
    names = [name for name, _ in labels]
    _check(names == sorted(set(names)), "labels out of order")
    return labels


def _items(plain: Any) -> list[Item]:
    items = []
    for kind, name, labels, state in _list(plain):
        _check(_text(kind) in _STATES, "an unknown kind of metric")
        _check(all(_text(name).split(".")), "a metric without a name")
        items.append(Item(kind, name, _labels(labels), _STATES[kind](state)))
    return items


def _descriptions(plain: Any) -> Descriptions:
    return {
        _text(name): Description.checked(_text(text), unit, _floats(buckets))
        for name, text, unit, buckets in _list(plain)
    }


def _update(*fields: Any) -> Update:
    identity, process, host, seq, base, items, descriptions, ancestors, max_series = fields
    _identity(identity)
    _check(_whole(base) < _whole(seq, 1), "an update that continues itself")
    return Update(
        identity, _process(process), _text(host), seq, base, _items(items), _descriptions(descriptions),
        tuple(_ancestor(ancestor) for ancestor in _list(ancestors)), _whole(max_series, 1),
    )  # fmt: skip


def _ancestor(plain: Any) -> Update:
    fields = _list(plain)
    _check(len(fields) == 9 and fields[7] == [], "an ancestor with ancestors")
    return _update(*fields)


def _journal(*fields: Any) -> Journal:
    host, owners, reporters, retired, left, descriptions, max_series = fields
    return Journal(
        _text(host), tuple(map(_process, _list(owners))), _pairs(reporters), _whole(retired),
        tuple(map(_identity, _list(left))), _descriptions(descriptions), _whole(max_series, 1),
    )  # fmt: skip


def _record(update: Any, silent: Any, ancestors: Any, seqs: Any) -> Record:
    decoded = _update(*_list(update))
    _check(type(silent) is bool, "something that is neither true nor false")
    known = tuple(map(_whole, _list(seqs)))
    _check(len(known) == len(decoded.items), "series that do not match")
    return Record(decoded, silent, tuple(map(_identity, _list(ancestors))), known)


def _process(plain: Any) -> Process:
    pid, started = _list(plain)
    _check(_whole(pid, 1) < 1 << 31, "a pid out of range")
    return Process(pid, _whole(started))


_MESSAGES: dict[str, Callable[..., Message]] = {
    "Update": _update,
    "Read": lambda correlation, what, update: Read(_whole(correlation), _text(what), _update(*_list(update))),
    "Hello": lambda correlation, host, processes: Hello(
        _whole(correlation), _text(host), tuple(map(_process, _list(processes)))
    ),
    "HandOver": lambda correlation, version: HandOver(_whole(correlation), _whole(version)),
    "Goodbye": lambda correlation, update: Goodbye(_whole(correlation), _update(*_list(update))),
    "Reply": lambda correlation, status, payload: Reply(_whole(correlation), _text(status), _bytes(payload)),
    "Journal": _journal,
    "Record": _record,
    "Merged": lambda tick, items, descriptions: Merged(
        _whole(tick), _items(items), _descriptions(descriptions)
    ),
}
