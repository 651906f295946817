"""Values and labels that can't be recorded as they are: counted, and logged once for each series."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from tapes.errors import KindConflict, short_repr
from tapes.metrics import Counter
from tapes.naming import MAX_LABEL_CHARACTERS, Labels
from tapes.once import OnceLogger

REJECTED = "tapes.rejected"  # the counter of values and messages that were dropped
CUT = "tapes.labels.cut"  # the counter of series with a label value that was cut
_MAX_LOGGED = 1 << 16


class Rejections:
    """What ``registry`` dropped or cut."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._once = OnceLogger(logging.getLogger("tapes.registry"), _MAX_LOGGED)

    def reject(self, name: str, labels: Labels, value: Any, why: str) -> None:
        """Count a dropped ``value`` in `REJECTED`."""
        with contextlib.suppress(KindConflict):
            self._registry.own(Counter, REJECTED).increment()
        self._once.warning(
            (name, labels),
            "tapes dropped %s for %r: %s (further ones are counted in %s)",
            short_repr(value), name, why, REJECTED,
        )  # fmt: skip

    def note_cut(self, name: str) -> None:
        """Count a series of ``name`` with a cut label value in `CUT`."""
        self._registry.own(Counter, CUT).increment()
        self._once.warning(
            (CUT, (("name", name),)),
            "tapes cut a label's value of %r at %d characters (further series are counted in %s). "
            "Is it what a client sent, such as a header?",
            name, MAX_LABEL_CHARACTERS, CUT,
        )  # fmt: skip

    def forget(self, name: str, labels: Labels) -> None:
        """Log the next rejection of a series, which was removed, again."""
        self._once.forget((name, labels))
