"""What all metrics share: a name, labels, an owner, and what a forked child does with them."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, ClassVar, Protocol, cast

from tapes.clock import Clock
from tapes.metrics.folding import Folding, State
from tapes.metrics.misuse import LabelsOf
from tapes.metrics.origin import with_baseline
from tapes.metrics.sifting import NEGATIVE, TOO_LARGE, checked_number
from tapes.naming import Labels
from tapes.threads import RLock

DOWN = object()
"""In a buffer, ``(n, DOWN)`` is a step down among steps up."""


class Owner(Protocol):
    """The registry that made a metric."""

    def rejected(self, metric: Metric, value: Any, why: str) -> None:
        """Count and log a value that can't be recorded."""

    def recipe(self, metric: Metric) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what makes the metric in another process, for `pickle`; raises `InvalidArgument` if none."""


class Metric(Folding):
    """A named series that a process records into; made by a registry.

    Thread and fork safety: recording and reading are safe from any thread, from signal handlers and from
    destructors. A forked child counts from zero, whatever threads its parent had. What the child inherits is
    detached, as several processes have it and it counts once.

    Copying a metric, even deeply, returns the metric itself. A pickled metric of the default registry is the
    one of its name and labels in the process that unpickles it. No other metric can be pickled.
    """

    kind: ClassVar[str]
    _least: ClassVar[float] = -inf
    _most: ClassVar[float] = inf
    _internal = frozenset({
        "after_fork", "awaits_producer", "collect", "detach_inherited", "drain", "has_producer", "is_due",
        "is_unchanged_since", "note_baseline", "note_failure", "note_late", "produce", "run_producer",
        "sleep", "state", "total_state",
    })  # fmt: skip

    __slots__ = ("__weakref__", "_inherited", "_owner", "labels", "name")

    def __init__(self, name: str, labels: Labels, clock: Clock, owner: Owner) -> None:
        self.name = name
        self.labels: Labels = LabelsOf(labels)
        self._owner = owner
        self._inherited: Metric | None = None
        super().__init__(clock)

    def __repr__(self) -> str:
        labels = "".join(f", {name}={value!r}" for name, value in self.labels)
        return f"<tapes {self.kind} {self.name!r}{labels}>"

    def __copy__(self) -> Metric:
        return self

    def __deepcopy__(self, memo: Any) -> Metric:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._owner.recipe(self)

    def total_state(self) -> State:
        """Return the state with what was inherited from processes that this one was forked from."""
        state, inherited = self.collect(), self._inherited
        if inherited is None:
            return state
        total: State = type(state).merge((inherited.total_state(), state))
        return total

    def drain(self) -> State:
        """Return the state and start again from zero, in one step; what was inherited is forgotten."""
        self._fold(self._clock(), wait=True)
        initial = self._initial(self._clock())

        def swap() -> Any:  # a fold that this call interrupts notices that its state was replaced
            state, self._state = self._state, initial
            self._inherited = None
            return state

        return cast("State", self._locked(swap))

    def detach_inherited(self) -> Metric | None:
        """Begin from zero in a forked child; return a metric of what is inherited, ``None`` if nothing is.

        Folds nothing, so no foreign number can hold up a fork.
        """
        if not self._holds_something():
            return None
        aside = self._duplicate()
        aside._lock, aside._folding = RLock(), False
        aside._bad, aside._owner = [], _Ownerless()  # the parent counts them
        self._inherited = aside
        self._buffer = self._pending = []
        self._state = self._initial(self._clock())
        return aside

    def _duplicate(self) -> Metric:
        other = object.__new__(type(self))
        for cls in type(self).__mro__:
            for slot in getattr(cls, "__slots__", ()):
                if slot != "__weakref__":
                    setattr(other, slot, getattr(self, slot))
        return other

    def _holds_something(self) -> bool:
        return bool(self._pending) or not self._state.is_empty

    def note_baseline(self, state: Any) -> None:
        """Make the count of ``state`` the baseline: aggregators before the present one had it."""

        def note() -> None:
            while True:
                before = self._state
                noted = with_baseline(before, state.counted)
                if self._state is before:
                    self._state = noted
                    return

        if state is not None:
            self._locked(note)

    def _reject(self, value: Any, why: str) -> None:
        self._owner.rejected(self, value, why)

    def _checked(self, value: Any) -> Any:
        number = checked_number(value)
        if number < self._least:
            raise ValueError(NEGATIVE)
        if number > self._most:
            raise ValueError(TOO_LARGE)
        return number


class _Ownerless:
    """The owner of what a fork has detached: the parent counts its bad values."""

    def rejected(self, metric: Metric, value: Any, why: str) -> None:
        pass

    def recipe(self, metric: Metric) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        raise NotImplementedError
