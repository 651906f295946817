"""Hiding internal methods of public classes.

A metric and a registry have methods that only tapes itself calls. They stay reachable, but neither ``dir()``,
which completion uses, nor ``help()`` lists them.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterable
from typing import ClassVar


class Face(ABCMeta):
    """The type of a class, maybe an abstract one, that hides ``_internal`` names from ``dir(cls)``."""

    _internal: frozenset[str]

    def __dir__(cls) -> Iterable[str]:
        return [name for name in super().__dir__() if name not in cls._internal]


class Faced(metaclass=Face):
    """The base of a class that hides ``_internal`` names, of its objects and of the class itself."""

    __slots__ = ()
    _internal: ClassVar[frozenset[str]] = frozenset()

    def __dir__(self) -> Iterable[str]:
        return [name for name in super().__dir__() if name not in self._internal]
