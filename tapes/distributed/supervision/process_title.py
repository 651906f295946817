"""The title of a process in ``ps``.

Theory. Linux shows the memory that held the arguments of a process at its start as its command line. The
process can write another text there. If the last byte of that memory is not NUL, the text ends at the first
NUL. A longer text continues in the memory of the environment, which comes next. Before that is overwritten,
every variable is set again, so that the C library has its own copy.
"""

from __future__ import annotations

import contextlib
import os

from tapes.processes import stat_fields

_NAME = b"tapes-aggr"  # in ``top`` and ``ps -e``; at most 15 bytes


def set_title(text: str) -> None:
    """Show ``text`` as the command line of this process; do nothing on systems other than Linux."""
    with contextlib.suppress(OSError, ImportError):
        with open("/proc/self/comm", "wb") as file:
            file.write(_NAME)
        _write(os.fsencode(text), *stat_fields(os.getpid(), 48, 49, 50, 51))


def _write(title: bytes, arg_start: int, arg_end: int, env_start: int, env_end: int) -> None:
    import ctypes  # some builds of Python lack it

    room = arg_end - arg_start
    if not arg_start or room < 2:
        return
    if len(title) < room - 1:  # at least one NUL precedes the last byte
        ctypes.memmove(arg_start, title.ljust(room - 1, b"\0") + b"\1", room)
        return
    if env_start != arg_end:
        title, env_end = title[: room - 1], arg_end
    for name, value in os.environb.items():
        os.putenv(name, value)
    title = title[: env_end - arg_start - 1] + b"\0"
    ctypes.memmove(arg_start, title, len(title))
