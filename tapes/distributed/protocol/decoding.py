"""The decoding half of the wire: bytes of a stranger to a valid message, or a `WireError`.

Long values are read one element at a time from an `.unpacker.Unpacker`, and each is checked before the next
is built. So time is proportional to a message's length, and memory is bounded as described there.

A valid message must do no harm later, when it is added to others and shown. So numbers have bounds which no
honest process reaches and which sums keep, and names follow the rules of `tapes.naming`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from math import fsum, isfinite
from operator import lt
from typing import Any

from tapes.bins import MAX_KEY
from tapes.distributed.protocol import messages
from tapes.distributed.protocol.messages import Item, Message, Update
from tapes.distributed.protocol.unpacker import Unpacker, check
from tapes.errors import WireError
from tapes.ewma import Rates
from tapes.metrics import MERGE_MODES, CounterState, GaugeState, HistogramState, MeterState, State, TimerState
from tapes.metrics.origin import Origin
from tapes.naming import Labels, canonical_labels, check_name
from tapes.processes import Process
from tapes.sketch import EMPTY, MAX_VALUES, Sketch, counts_array
from tapes.snapshot import Description
from tapes.sums import Number, Total

MAX_INT = (1 << 63) - 1  # maximum of integers, except in totals
MAX_DIGITS = 31
"""Maximum digits of a total: one process counts less than 2^63, and 2^36 of them less than 2^99."""
MAX_EVENTS = 2.0**80
"""Maximum of events and rates: one process counts less than 2^63, and 2^16 of them less than 2^79."""
_MAX_PROCESSES = 1 << 16
"""Maximum number of processes in a message. Each is watched."""
_MAX_PARTS = 64  # maximum number of floats in an exact sum; 40 are enough for any


# Each function returns its part, or raises. Those that take an `Unpacker` read parts that may be long.


def _list(value: Any) -> tuple[Any, ...]:
    check(type(value) is tuple, "a value that is not a list")
    return value  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    check(type(value) is str, "a value that is not a text")
    return value  # type: ignore[no-any-return]


def _bytes(value: Any) -> bytes:
    check(type(value) is bytes, "a value that is not bytes")
    return value  # type: ignore[no-any-return]


def _whole(value: Any, least: int = 0, most: int = MAX_INT) -> int:
    check(type(value) is int and least <= value <= most, "a number out of range")
    return value  # type: ignore[no-any-return]


def _number(value: Any) -> Number:
    check(type(value) is int or (type(value) is float and isfinite(value)), "no finite number")
    return value  # type: ignore[no-any-return]


def _exact(value: Any) -> Number:
    """Return a number of which an integer may be any size, and is text if it is large."""
    if type(value) is str:
        digits = value.removeprefix("-")
        check(len(digits) <= MAX_DIGITS and digits.isdecimal() and digits.isascii(), "no whole number")
        return int(value)
    return _number(value)


def _float(value: Any) -> float:
    check(type(value) is float and isfinite(value), "no finite number")
    return value  # type: ignore[no-any-return]


def _floats(value: Any) -> tuple[float, ...]:
    floats = _list(value)
    check(all(type(part) is float and isfinite(part) for part in floats), "no finite numbers")
    return floats


def _parts(value: Any) -> tuple[float, ...]:
    """Return a sum as `tapes.sums.exact_sum` does: first the rounded sum, then what rounding left."""
    parts = _floats(value)
    check(not parts or (len(parts) <= _MAX_PARTS and fsum(parts) == parts[0]), "an inexact sum")
    return parts


def _events(value: Any) -> float:
    """Return events or their rate; larger ones would become infinite in sums."""
    check(type(value) is float and 0.0 <= value <= MAX_EVENTS, "a number out of range")
    return value  # type: ignore[no-any-return]


def _origin(plain: Any) -> Origin:
    created, baseline = _list(plain)
    check(type(created) is float and created > 0, "no time of creation")  # infinite if it is unknown
    return Origin(created, _exact(baseline))


def _total(plain: Any) -> Total:
    whole, parts = _list(plain)
    number, exact = _exact(whole), _parts(parts)
    check(number >= 0 and (not exact or exact[0] > 0), "a negative count")
    if type(number) is not int:
        raise WireError("a message with a fraction in a whole number")
    return Total(number, exact)


def _rates(plain: Any) -> Rates:
    tick, pending, linear, first, first_count = _list(plain)
    m1, m5, m15 = map(_events, _list(linear))
    check(_whole(first) <= _whole(tick) + 1, "a first tick that is still to come")
    return Rates(tick, _events(pending), (m1, m5, m15), first, _events(first_count))


_EMPTY: Any = (0, (), 0.0, 0.0, (), (), 0, (), 0.0)


def _sketch(plain: Any, least: int = -MAX_KEY) -> Sketch:
    count, parts, low, high, keys, counts, tick, weights, recent_sum = _list(plain)
    if _whole(count, 0, MAX_VALUES) == 0:
        check(plain == _EMPTY, "values of which there are none")
        return EMPTY
    check({type(keys), type(counts), type(weights)} == {tuple}, "bins that are not lists")
    packed = array("h", keys), counts_array(counts), array("d", weights)  # or what is in them is not a number
    check(len(keys) == len(counts) == len(weights), "bins that do not match")
    check(all(map(lt, keys, keys[1:])), "bins out of order")
    check(keys[0] >= least and keys[-1] <= MAX_KEY, "a bin out of range")
    check(min(counts) > 0 and sum(counts) == count, "bins that do not add up to the count")
    # A value weighs 1 at most; rounding may add the rest. NaN fails this check, too.
    check(min(weights) >= 0.0 and sum(weights) <= count * (1 + 1e-6), "weights out of range")
    check(_float(low) <= _float(high), "a minimum above the maximum")
    check(low >= 0 or least < 0, "a negative duration")
    return Sketch(
        count, _parts(parts), low, high, packed[0], packed[1], _whole(tick), packed[2], _float(recent_sum)
    )


def _counter(plain: Any) -> CounterState:
    up, down, origin = _list(plain)
    return CounterState(_total(up), _total(down), _origin(origin))


def _gauge(plain: Any) -> GaugeState:
    value, mode, since = _list(plain)
    check(mode in MERGE_MODES, "an unknown merge mode")
    return GaugeState(
        None if value is None else _number(value),
        MERGE_MODES[MERGE_MODES.index(mode)],  # rather than a text of its own for each gauge
        None if since is None else float(_number(since)),
    )


def _meter(plain: Any) -> MeterState:
    count, rates, origin = _list(plain)
    return MeterState(_total(count), _rates(rates), _origin(origin))


def _histogram(plain: Any) -> HistogramState:
    sketch, origin = _list(plain)
    return HistogramState(_sketch(sketch), _origin(origin))


def _timer(plain: Any) -> TimerState:
    sketch, rates, origin = _list(plain)
    return TimerState(_sketch(sketch, 0), _rates(rates), _origin(origin))


STATES: dict[str, tuple[str, Callable[[Any], State]]] = {
    "counter": ("counter", _counter),
    "gauge": ("gauge", _gauge),
    "meter": ("meter", _meter),
    "histogram": ("histogram", _histogram),
    "timer": ("timer", _timer),
}
"""Kind to itself, so that all series share one text, and to the function that reads its states."""


def _name(value: Any) -> str:
    check_name(value)
    return value  # type: ignore[no-any-return]


def _labels(plain: Any) -> Labels:
    if plain:
        check(type(plain) is tuple and canonical_labels(dict(plain), {}) == plain, "labels out of order")
    return _list(plain)


def _tuple_of(element: Callable[[Unpacker], Any]) -> Callable[[Unpacker], tuple[Any, ...]]:
    return lambda read: tuple(read.each(element))


def _pair(read: Unpacker) -> tuple[str, str]:
    check(read.count() == 2, "malformed pairs")
    return _text(read.flat()), _text(read.flat())


def _in_parts(what: str, *readers: Callable[[Unpacker], Any]) -> Callable[[Unpacker], tuple[Any, ...]]:
    def read_parts(read: Unpacker) -> tuple[Any, ...]:
        check(read.count() == len(readers), f"{what} with another number of fields")
        return tuple([read_part(read) for read_part in readers])

    return read_parts


_pairs = _tuple_of(_pair)
_long_item = _in_parts("a series", Unpacker.flat, Unpacker.flat, _pairs, Unpacker.piece)
_long_description = _in_parts("a description", Unpacker.flat, Unpacker.flat, Unpacker.flat, Unpacker.piece)
_long_sent_count = _in_parts("a count", Unpacker.flat, _pairs, Unpacker.piece)


def _item(read: Unpacker) -> Item:
    kind, name, labels, state = _list(read.either(_long_item))
    check(kind in STATES, "an unknown kind of metric")
    kind, read_state = STATES[kind]
    return Item(kind, _name(name), _labels(labels), read_state(state))


def _described(read: Unpacker) -> tuple[str, Description]:
    name, text, unit, buckets = _list(read.either(_long_description))
    return _name(name), Description.checked(text, unit, _floats(buckets))


def _descriptions(read: Unpacker) -> messages.Descriptions:
    return dict(read.each(_described))


def _identity(read: Unpacker) -> bytes:
    identity = _bytes(read.flat())
    check(len(identity) == 16, "an identity that is not sixteen bytes")
    return identity


def _process(read: Unpacker) -> Process:
    check(read.count() == 2, "a malformed process")
    return Process(_whole(read.flat(), 1, (1 << 31) - 1), _whole(read.flat()))


def _processes(read: Unpacker) -> tuple[Process, ...]:
    return tuple(read.each(_process, _MAX_PROCESSES))


def _update(read: Unpacker, fields: int | None = None, *, is_ancestor: bool = False) -> Update:
    check((read.count() if fields is None else fields) == len(Update._fields), "a malformed update")
    ancestors = _no_ancestors if is_ancestor else _ancestors
    update = Update(
        _identity(read), _process(read), _text(read.flat()), _whole(read.flat(), 1), _whole(read.flat()),
        read.each(_item), _descriptions(read), ancestors(read), _whole(read.flat(), 1),
        _whole(read.flat()),
    )  # fmt: skip
    check(update.base < update.seq, "an update that continues itself")
    return update


def _ancestors(read: Unpacker) -> tuple[Update, ...]:
    return tuple(read.each(lambda read: _update(read, is_ancestor=True)))


def _no_ancestors(read: Unpacker) -> tuple[Update, ...]:
    check(read.count() == 0, "an ancestor with ancestors")
    return ()


def _sent_count(read: Unpacker) -> messages.SentCount:
    name, labels, sent = _list(read.either(_long_sent_count))
    exact: Any = None if sent is None else tuple(map(_exact, _list(sent)))
    check(exact is None or len(exact) == 3, "a malformed count")
    return messages.SentCount(_name(name), _labels(labels), exact)


def _bool(read: Unpacker) -> bool:
    value: bool = read.flat()
    check(type(value) is bool, "something that is neither true nor false")
    return value


def _natural(read: Unpacker) -> int:
    return _whole(read.flat())


def _string(read: Unpacker) -> str:
    return _text(read.flat())


def _items(read: Unpacker) -> list[Item]:
    return read.each(_item)


_FIELDS: dict[type[Any], tuple[Callable[[Unpacker], Any], ...]] = {
    messages.Attach: (_natural, _string, _processes),
    messages.Cursor: (_string, _tuple_of(_sent_count)),
    messages.Flush: (_natural,),
    messages.Goodbye: (_natural, _update),
    messages.HandOver: (_natural, _natural),
    messages.Journal: (
        _string, _processes, _pairs, _natural, _tuple_of(_identity), _descriptions,
        lambda read: _whole(read.flat(), 1),
    ),
    messages.Merged: (_natural, _items, _descriptions),
    messages.Read: (_natural, _string, _update),
    messages.Record: (
        _update, _bool, lambda read: _whole(read.flat(), 0, 2), _tuple_of(_identity),
        _tuple_of(_natural),
    ),
    messages.Retired: (_items,),
}  # fmt: skip
"""By message, the functions that read its fields."""
_BY_NAME = {message.__name__: message for message in _FIELDS}


def decoded(name: str, fields: int, read: Unpacker) -> Message:
    """Return the message of type ``name``, which has ``fields`` fields; nothing may follow it."""
    message: Message
    if name == Update.__name__:
        message = _update(read, fields)
    else:
        check(name in _BY_NAME, "an unknown type")
        readers = _FIELDS[_BY_NAME[name]]
        check(fields == len(readers), "fields too many or too few")
        message = _BY_NAME[name](*[read_field(read) for read_field in readers])
    if isinstance(message, messages.Record):
        check(len(message.seqs) == len(message.update.items), "series that do not match")
    check(read.is_done, "something behind it")
    return message
