"""The catalogue: which names there are, of which kind, and that none hides what belongs to another.

Lock-free, as the registry is: dictionaries decide races, and places are handed out by a counter.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, ItemsView

from tapes.errors import KindConflict
from tapes.metrics import Metric
from tapes.naming import Labels
from tapes.snapshot import FIELDS

__all__ = ["MAX_SERIES", "OVERFLOW", "Catalogue", "NameEntry", "warn_of_overflow"]

MAX_SERIES = 2000
"""So many label sets a name has, unless told otherwise."""
OVERFLOW = ("overflow", "true")
"""The label of the series that takes what has no place of its own."""

_log = logging.getLogger("tapes.registry")


class NameEntry:
    """All metrics of one name, and how many more there may be."""

    __slots__ = ("_places", "by_labels", "free_places", "kind", "overflowing")

    def __init__(self, kind: type[Metric]) -> None:
        self.kind = kind
        self.by_labels: dict[Labels, Metric] = {}
        self.overflowing = False
        self.free_places: list[int] = []
        self._places = itertools.count()

    def take_place(self) -> int:
        """Return the number of a free place, from 0."""
        try:
            return self.free_places.pop()
        except IndexError:
            return next(self._places)


class Catalogue:
    """Names to their metrics."""

    def __init__(self) -> None:
        self._metrics: dict[str, NameEntry] = {}
        self._below: dict[str, dict[str, str]] = {}

    def get(self, name: str) -> NameEntry | None:
        """Return the metrics of ``name``, or ``None`` if there never were any."""
        return self._metrics.get(name)

    def items(self) -> ItemsView[str, NameEntry]:
        """Return all names and their metrics, as of now."""
        return self._metrics.copy().items()  # in one step, as others may register meanwhile

    def metrics_of(self, kind: type[Metric], name: str) -> NameEntry:
        """Return the metrics of ``name``; entered into the catalogue if it isn't there.

        Raises:
            KindConflict: If the name belongs to another kind, would hide a field of the metric above it, or
                has a metric below it that would hide one of its own.
        """
        metrics = self._metrics.get(name)
        if metrics is None:
            self._check_hiding(kind.kind, name)
            metrics = self._metrics.setdefault(name, NameEntry(kind))
        if metrics.kind is not kind and not metrics.by_labels:  # all its series were removed
            self._check_hiding(kind.kind, name)
            metrics = self._metrics[name] = NameEntry(kind)
        if metrics.kind is not kind:
            raise KindConflict(
                f"{name!r} is a {metrics.kind.kind} already",
                got=f"{kind.kind}({name!r})",
                expected=f"{metrics.kind.kind}({name!r})",
                remedy="choose another name for one of them",
            )
        return metrics

    def find_or_make(
        self,
        name: str,
        labels: Labels,
        kind: type[Metric],
        build: Callable[[Labels], Metric],
        max_series: int,
        overflow: Labels,
    ) -> Metric:
        """Return the metric of these labels; built if it isn't there, unless all places are taken.

        Args:
            name: The full name.
            labels: The labels.
            kind: The kind of metric.
            build: Makes one, given its labels.
            max_series: How many places a name has.
            overflow: The labels of the metric that takes what has no place.

        Raises:
            KindConflict: As `metrics_of`.
        """
        metrics = self.metrics_of(kind, name)
        metric = metrics.by_labels.get(labels)
        if metric is not None:
            return metric
        place = metrics.take_place()
        within = place < max_series
        if not within and labels not in metrics.by_labels:  # another thread may have made it meanwhile
            if not metrics.overflowing:
                metrics.overflowing = True
                warn_of_overflow(name, max_series)
            labels = overflow
            metric = metrics.by_labels.get(labels)
            if metric is not None:
                return metric
        made = build(labels)
        metric = metrics.by_labels.setdefault(labels, made)
        if within and metric is not made:
            metrics.free_places.append(place)
        return metric

    def _check_hiding(self, kind: str, name: str) -> None:
        segments = name.split(".")
        parents = [".".join(segments[:depth]) for depth in range(1, len(segments))]
        for parent, segment in zip(parents, segments[1:]):
            above = self._metrics.get(parent)
            if above is not None and above.by_labels and segment in FIELDS[above.kind.kind]:
                raise _hides(name, kind, segment, parent, above.kind.kind)
        for segment, child in self._below.get(name, {}).items():
            below = self._metrics.get(child)
            if segment in FIELDS[kind] and below is not None and below.by_labels:
                raise _hides(child, below.kind.kind, segment, name, kind)
        for parent, segment in zip(parents, segments[1:]):
            self._below.setdefault(parent, {})[segment] = name


def warn_of_overflow(name: str, max_series: int) -> None:
    """Log that a name has no place for further label sets."""
    with contextlib.suppress(Exception):  # whatever logging is made to do, it is not the request's
        _log.warning(
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
