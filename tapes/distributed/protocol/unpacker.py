"""A message of a stranger, value by value, in bounded time and memory.

Theory. MessagePack can make fifty bytes of one: a byte becomes a number or an empty list, and five bytes
announce a list of four thousand million. So every value is read in two steps. An unpacker that builds nothing
runs over it, finds its end, and checks that everything announced is there; only then another one builds it.
Values with parts are built in pieces of `PIECE_BYTES` at most. Longer ones are lists, whose elements are read
one by one, or texts, which may have any length.

Bounds. Reading n bytes takes time in proportion to n, and on CPython 128 MB for a piece at most, beside what
`.decoding` keeps. That is checked, and takes at most 32 bytes for each byte; messages of real workers take
twice their length. The unpacker bounds nesting: 1,024 lists, and on PyPy the recursion limit.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any, NoReturn, TypeVar

import msgpack

from tapes.errors import WireError

PIECE_BYTES = 2 << 20  # a sketch with all possible bins takes 1.4 MB
_READ_BYTES = 1 << 16

_HAS_PARTS = frozenset((*range(0x80, 0xA0), 0xC1, *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)))
"""First bytes of maps, lists, extensions and unused codes."""

T = TypeVar("T")


def check(holds: bool, what: str) -> None:
    """Raise `WireError` for a message with ``what``, unless ``holds`` is true."""
    if not holds:
        raise WireError(f"a message with {what}")


def _refuse(*parts: Any) -> NoReturn:
    raise WireError("a message with a map or an extension")


class Unpacker:
    """Reads the values of a message, one after the other; lists become tuples.

    Any fault raises an exception of some kind, and ends the reading.
    """

    __slots__ = ("_ahead", "_data", "_here")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._ahead = msgpack.Unpacker(BytesIO(data), read_size=_READ_BYTES)  # builds nothing
        self._here = msgpack.Unpacker(
            BytesIO(data), read_size=_READ_BYTES, use_list=False, unicode_errors="surrogatepass",
            object_pairs_hook=_refuse, ext_hook=_refuse, max_map_len=0, max_ext_len=0,
        )  # fmt: skip

    @property
    def is_done(self) -> bool:
        return bool(self._ahead.tell() == len(self._data))

    def count(self) -> int:
        """Read the head of a list; return the number of elements that it announces."""
        self._ahead.read_array_header()
        count: int = self._here.read_array_header()
        return count

    def each(self, read: Callable[[Unpacker], T], most: int | None = None) -> list[T]:
        """Return the elements of a list, ``most`` at most, each as ``read`` returns it."""
        count = self.count()
        check(most is None or count <= most, "a list that is too long")
        return [read(self) for _ in range(count)]

    def flat(self) -> Any:
        """Return the next value, which has no parts: a number, or a text or bytes of any length."""
        ahead = self._ahead
        check(self._data[ahead.tell()] not in _HAS_PARTS, "a nested value where a plain one belongs")
        ahead.skip()
        return self._here.unpack()

    def piece(self) -> Any:
        """Return the next value, with all of its parts."""
        ahead = self._ahead
        start = ahead.tell()
        ahead.skip()
        check(ahead.tell() - start <= PIECE_BYTES, "something that is too long")
        return self._here.unpack()

    def either(self, in_parts: Callable[[Unpacker], Any]) -> Any:
        """Return the next value as a `piece`; if it is too long for one, as ``in_parts`` reads it."""
        ahead = self._ahead
        start = ahead.tell()
        ahead.skip()
        end = ahead.tell()
        if end - start <= PIECE_BYTES:
            return self._here.unpack()
        self._here.skip()
        return in_parts(Unpacker(self._data[start:end]))
