"""What uWSGI lets Python do in its processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def options() -> set[str] | None:
    """Return the names of uWSGI's options, ``None`` outside of uWSGI."""
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is None:
        return None
    return {name.decode() if isinstance(name, bytes) else name for name in getattr(uwsgi, "opt", ())}


def is_master() -> bool:
    """Return whether this is uWSGI before it forks its workers: in C, so no thread may run meanwhile."""
    uwsgi: Any = sys.modules.get("uwsgi")
    return uwsgi is not None and not uwsgi.worker_id()


def after_worker_fork(first: Callable[[], None], last: Callable[[], None] | None = None) -> None:
    """Have each forked worker of uWSGI call ``first``, then the hook that is set already, then ``last``."""
    uwsgi: Any = sys.modules["uwsgi"]
    former = getattr(uwsgi, "post_fork_hook", None)

    def hook() -> None:
        first()
        if former is not None:
            former()
        if last is not None:
            last()

    uwsgi.post_fork_hook = hook
