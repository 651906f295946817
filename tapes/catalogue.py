"""The catalogue: which names exist, of which kind, and that none hides what belongs to another.

Like the registry it takes no lock: dictionaries decide races.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, ItemsView

from tapes.errors import KindConflict
from tapes.metrics import Metric
from tapes.naming import Labels
from tapes.once import OnceLogger
from tapes.snapshot import FIELDS

MAX_SERIES = 2000
"""Default maximum of label sets of a name."""
OVERFLOW = ("overflow", "true")
"""The label of the series that stands in for all label sets beyond the maximum."""

_Build = Callable[[Labels], Metric]
_log = logging.getLogger("tapes.registry")


class NameEntry:
    """All metrics of one name."""

    __slots__ = ("by_labels", "kind")

    def __init__(self, kind: type[Metric]) -> None:
        self.kind = kind
        self.by_labels: dict[Labels, Metric] = {}

    def is_full(self, max_series: int, overflow: Labels) -> bool:
        """Return whether there are ``max_series`` label sets, not counting ``overflow``.

        Threads that make a series at the same moment may each see the last free place.
        """
        return len(self.by_labels) - (overflow in self.by_labels) >= max_series


class Catalogue:
    """Names to their metrics."""

    def __init__(self) -> None:
        self._entries: dict[str, NameEntry] = {}
        self._below: dict[str, dict[str, str]] = {}
        self._once = OnceLogger(_log)

    def get(self, name: str) -> NameEntry | None:
        return self._entries.get(name)

    def items(self) -> ItemsView[str, NameEntry]:
        """Return all names and their entries, as of now."""
        return self._entries.copy().items()  # in one step, as others may register meanwhile

    def entry_of(self, kind: type[Metric], name: str) -> NameEntry:
        """Return the entry of ``name``; make it if it does not exist.

        Raises:
            KindConflict: If the name belongs to another kind, would hide a field of the metric above it, or
                has a metric below it that would hide one of its own.
        """
        entry = self._entries.get(name)
        if entry is None:
            self._check_hiding(kind.kind, name)
            entry = self._entries.setdefault(name, NameEntry(kind))
        if entry.kind is not kind and not entry.by_labels:  # all its series were removed
            self._check_hiding(kind.kind, name)
            entry = self._entries[name] = NameEntry(kind)
        if entry.kind is not kind:
            raise KindConflict(
                f"{name!r} is a {entry.kind.kind} already",
                got=f"{kind.kind}({name!r})",
                expected=f"{entry.kind.kind}({name!r})",
                remedy="choose another name for one of them",
            )
        return entry

    def find_or_make(
        self, name: str, labels: Labels, kind: type[Metric], build: _Build, max_series: int, overflow: Labels
    ) -> Metric:
        """Return the metric of these labels; build it if it does not exist and the name is not full.

        In a full name, the metric of ``overflow`` stands in for all further ones. Raises as `entry_of`.
        """
        entry = self.entry_of(kind, name)
        metric = entry.by_labels.get(labels)
        if metric is not None:
            return metric
        # Another thread may have made it meanwhile, and so have filled the name.
        if entry.is_full(max_series, overflow) and labels not in entry.by_labels:
            warn_of_overflow(self._once, name, max_series)
            labels = overflow
            metric = entry.by_labels.get(labels)
        return metric or entry.by_labels.setdefault(labels, build(labels))

    def _check_hiding(self, kind: str, name: str) -> None:
        segments = name.split(".")
        parents = [".".join(segments[:depth]) for depth in range(1, len(segments))]
        for parent, segment in zip(parents, segments[1:]):
            above = self._entries.get(parent)
            if above is not None and above.by_labels and segment in FIELDS[above.kind.kind]:
                raise _hides(name, kind, segment, parent, above.kind.kind)
        for segment, child in self._below.get(name, {}).items():
            below = self._entries.get(child)
            if segment in FIELDS[kind] and below is not None and below.by_labels:
                raise _hides(child, below.kind.kind, segment, name, kind)
        for parent, segment in zip(parents, segments[1:]):
            self._below.setdefault(parent, {})[segment] = name


def warn_of_overflow(once: OnceLogger, name: str, max_series: int) -> None:
    """Log, once for each name, that its further label sets become one series."""
    once.warning(
        name,
        "%r has reached %d label sets; further ones are recorded as overflow=\"true\". "
        "Is a label's value unbounded, like a raw path or an id?",
        name, max_series,
    )  # fmt: skip


def _hides(child: str, child_kind: str, segment: str, parent: str, parent_kind: str) -> KindConflict:
    return KindConflict(
        f"{child_kind} {child!r} would hide the field {segment!r} of {parent_kind} {parent!r}",
        got=child,
        expected=f"a segment other than {segment!r} below {parent!r}",
        remedy="choose another name for one of them",
    )
