"""The decoding half of the wire: bytes of a stranger to a valid message, or a `WireError`.

What is long is read one element at a time from an `.unpacker.Unpacker`, and each is checked
before the next is built; so time is in proportion to a message's length, and memory as that module says.

What is valid has to be harmless later, too: added to others, and shown. So numbers are held within bounds
that no honest process reaches and that addition keeps, and names are held to the rules of `tapes.naming`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from math import fsum, isfinite
from operator import lt
from typing import Any

from tapes.bins import MAX_KEY
from tapes.distributed.protocol.messages import (
    NOBODY,
    Attach,
    Descriptions,
    Flush,
    Goodbye,
    HandOver,
    Item,
    Journal,
    Merged,
    Message,
    Read,
    Record,
    Update,
)
from tapes.distributed.protocol.unpacker import Unpacker, check
from tapes.ewma import Rates
from tapes.metrics import (
    MERGE_MODES,
    CounterState,
    GaugeState,
    HistogramState,
    MeterState,
    State,
    TimerState,
)
from tapes.metrics.origin import Origin
from tapes.naming import Labels, canonical_labels, check_name
from tapes.processes import Process
from tapes.sketch import EMPTY, MAX_VALUES, Sketch, counts_array
from tapes.snapshot import Description
from tapes.sums import Number, Total

__all__ = ["MAX_DIGITS", "MAX_EVENTS", "MAX_WHOLE", "STATES", "decoded"]

MAX_WHOLE = (1 << 63) - 1
"""No whole number is larger, totals apart."""
MAX_DIGITS = 31
"""Maximum digits of an exact total: one process counts less than 2^63, and 2^36 of them less than 2^99."""
MAX_EVENTS = 2.0**80
"""Maximum of events and rates: one process counts less than 2^63, and 2^16 of them less than 2^79."""
_MAX_PROCESSES = 1 << 16
"""Each is watched; no kernel has as many under one supervisor."""
_MAX_PARTS = 64
"""An exact sum is written in 40 floats at most."""


# Each function returns its part, or raises. Those that take a reader read what may be long.


def _list(value: Any) -> tuple[Any, ...]:
    check(type(value) is tuple, "something that is no list")
    return value  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    check(type(value) is str, "something that is no text")
    return value  # type: ignore[no-any-return]


def _bytes(value: Any) -> bytes:
    check(type(value) is bytes, "something that is no bytes")
    return value  # type: ignore[no-any-return]


def _whole(value: Any, least: int = 0, most: int = MAX_WHOLE) -> int:
    check(type(value) is int and least <= value <= most, "a number out of range")
    return value  # type: ignore[no-any-return]


def _number(value: Any) -> Number:
    check(type(value) is int or (type(value) is float and isfinite(value)), "no finite number")
    return value  # type: ignore[no-any-return]


def _float(value: Any) -> float:
    check(type(value) is float and isfinite(value), "no finite number")
    return value  # type: ignore[no-any-return]


def _floats(value: Any) -> tuple[float, ...]:
    floats = _list(value)
    check(all(type(part) is float and isfinite(part) for part in floats), "no finite numbers")
    return floats


def _parts(value: Any) -> tuple[float, ...]:
    """Return what `tapes.sums.exact_sum` does: the sum comes first, and then what it was rounded by."""
    parts = _floats(value)
    check(not parts or (len(parts) <= _MAX_PARTS and fsum(parts) == parts[0]), "an inexact sum")
    return parts


def _events(value: Any) -> float:
    """Return events or their rate; more would become infinite when they are added up."""
    check(type(value) is float and 0.0 <= value <= MAX_EVENTS, "a number out of range")
    return value  # type: ignore[no-any-return]


def _origin(plain: Any) -> Origin:
    created, told = _list(plain)
    check(type(created) is float and created > 0, "no time of its making")  # infinite where nobody knows
    return Origin(created, _number(told))


def _total(plain: Any) -> Total:
    whole, parts = _list(plain)
    if type(whole) is str:
        check(len(whole) <= MAX_DIGITS and whole.isdecimal() and whole.isascii(), "no whole number")
        whole = int(whole)
    check(type(whole) is int and whole >= 0, "a number out of range")
    exact = _parts(parts)
    check(not exact or exact[0] > 0, "a negative count")
    return Total(whole, exact)


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
    check({type(keys), type(counts), type(weights)} == {tuple}, "bins that are no lists")
    packed = array("h", keys), counts_array(counts), array("d", weights)  # or what is in them is no number
    check(len(keys) == len(counts) == len(weights), "bins that do not match")
    check(all(map(lt, keys, keys[1:])), "bins out of order")
    check(keys[0] >= least and keys[-1] <= MAX_KEY, "a bin out of range")
    check(min(counts) > 0 and sum(counts) == count, "bins that do not add up to the count")
    # A value weighs 1 at most; the rest is what rounding may add. Not a number is not below it either.
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
"""Kind to itself, so that all series share one text, and to what reads its states."""


def _name(value: Any) -> str:
    check_name(value)
    return value  # type: ignore[no-any-return]


def _labels(plain: Any) -> Labels:
    if plain:
        check(type(plain) is tuple and canonical_labels(dict(plain), {}) == plain, "labels out of order")
    return _list(plain)


def _item(read: Unpacker) -> Item:
    kind, name, labels, state = _list(read.either(_long_item))
    check(kind in STATES, "an unknown kind of metric")
    kind, read_state = STATES[kind]
    return Item(kind, _name(name), _labels(labels), read_state(state))


def _long_item(read: Unpacker) -> Any:
    check(read.count() == 4, "a series that is none")
    return read.flat(), read.flat(), tuple(read.each(_pair)), read.piece()


def _pair(read: Unpacker) -> tuple[str, str]:
    check(read.count() == 2, "pairs that are none")
    return _text(read.flat()), _text(read.flat())


def _described(read: Unpacker) -> tuple[str, Description]:
    name, text, unit, buckets = _list(read.either(_long_description))
    return _name(name), Description.checked(text, unit, _floats(buckets))


def _long_description(read: Unpacker) -> Any:
    check(read.count() == 4, "a description that is none")
    return read.flat(), read.flat(), read.flat(), read.piece()


def _descriptions(read: Unpacker) -> Descriptions:
    return dict(read.each(_described))


def _identity(read: Unpacker) -> bytes:
    identity = _bytes(read.flat())
    check(len(identity) == 16, "an identity that is not sixteen bytes")
    return identity


def _process(read: Unpacker) -> Process:
    check(read.count() == 2, "a process that is none")
    return Process(_whole(read.flat(), 1, (1 << 31) - 1), _whole(read.flat()))


def _processes(read: Unpacker) -> tuple[Process, ...]:
    return tuple(read.each(_process, _MAX_PROCESSES))


def _fields_of_update(
    read: Unpacker, fields: int, ancestors: Callable[[Unpacker], list[Update]] | None = None
) -> Update:
    check(len(Update._fields) - 1 <= fields <= len(Update._fields), "an update that is none")
    ancestors = ancestors or (lambda read: read.each(_ancestor))
    update = Update(
        _identity(read), _process(read), _text(read.flat()), _whole(read.flat(), 1), _whole(read.flat()),
        read.each(_item), _descriptions(read), tuple(ancestors(read)), _whole(read.flat(), 1),
        _whole(read.flat()) if fields == len(Update._fields) else 0,  # version 1 has no program
    )  # fmt: skip
    check(update.base < update.seq, "an update that continues itself")
    return update


def _no_ancestors(read: Unpacker) -> list[Update]:
    check(read.count() == 0, "an ancestor with ancestors")
    return []


def _ancestor(read: Unpacker) -> Update:
    return _of_somebody(_fields_of_update(read, read.count(), _no_ancestors))


def _recorded(read: Unpacker) -> Update:
    """Return an update within a record: of a worker, or of nobody."""
    return _fields_of_update(read, read.count())


def _told(read: Unpacker) -> Update:
    """Return an update within a question."""
    return _of_somebody(_recorded(read))


def _of_somebody(update: Update) -> Update:
    """Refuse to take a stranger for the aggregator itself, or for all that have left."""
    check(update.identity != NOBODY, "nobody's update")
    return update


def _record(read: Unpacker) -> Record:
    update, silent, ancestors = _recorded(read), read.flat(), tuple(read.each(_identity))
    check(type(silent) is bool, "something that is neither true nor false")
    seqs = tuple(read.each(lambda read: _whole(read.flat())))
    check(len(seqs) == len(update.items), "series that do not match")
    return Record(update, silent, ancestors, seqs)


def _journal(read: Unpacker) -> Journal:
    return Journal(
        _text(read.flat()), _processes(read), tuple(read.each(_pair)), _whole(read.flat()),
        tuple(read.each(_identity)), _descriptions(read), _whole(read.flat(), 1),
    )  # fmt: skip


_MESSAGES: dict[str, tuple[type[Any], Callable[[Unpacker], Message]]] = {
    "Read": (Read, lambda read: Read(_whole(read.flat()), _text(read.flat()), _told(read))),
    "Attach": (Attach, lambda read: Attach(_whole(read.flat()), _text(read.flat()), _processes(read))),
    "HandOver": (HandOver, lambda read: HandOver(_whole(read.flat()), _whole(read.flat()))),
    "Flush": (Flush, lambda read: Flush(_whole(read.flat()))),
    "Goodbye": (Goodbye, lambda read: Goodbye(_whole(read.flat()), _told(read))),
    "Journal": (Journal, _journal),
    "Record": (Record, _record),
    "Merged": (Merged, lambda read: Merged(_whole(read.flat()), read.each(_item), _descriptions(read))),
}


def decoded(name: str, fields: int, read: Unpacker) -> Message:
    """Return the message of type ``name``, which has so many ``fields``; nothing may follow it."""
    message: Message
    if name == Update.__name__:
        message = _of_somebody(_fields_of_update(read, fields))
    else:
        check(name in _MESSAGES, "an unknown type")
        kind, read_fields = _MESSAGES[name]
        check(fields == len(kind._fields), "fields too many or too few")
        message = read_fields(read)
    check(read.is_done, "something behind it")
    return message
