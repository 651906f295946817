"""How a process of tapes appears in ``ps``.

Theory. Linux shows as the command line of a process what is in the memory where its arguments were at its
start. The process can write another text there. If the last byte of that memory is not NUL, the text ends
at the first NUL. A longer text goes on in the memory of the environment, which comes next. Before that
every variable is set again, so that the C library has its own copy of it.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["set_title"]

_NAME = b"tapes-aggr"
"""What ``top`` and ``ps -e`` show, which have room for 15 bytes."""
_FIRST_FIELD = 3
"""The number of the first field behind the name of the command, in proc(5)'s table of ``/proc/pid/stat``."""
_ARG_START, _ENV_END = 48, 51


def set_title(text: str) -> None:
    """Show ``text`` as the command line of this process; nothing on a system where that can't be done."""
    with contextlib.suppress(OSError, ImportError, ValueError, IndexError):
        with open("/proc/self/comm", "wb") as file:
            file.write(_NAME)
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        places = [int(field) for field in fields[_ARG_START - _FIRST_FIELD : _ENV_END - _FIRST_FIELD + 1]]
        _write(os.fsencode(text), *places)


def _write(title: bytes, arg_start: int, arg_end: int, env_start: int, env_end: int) -> None:
    import ctypes  # some builds of Python have none

    room = arg_end - arg_start
    if not arg_start or room < 2:
        return
    if len(title) < room - 1:  # one NUL at least comes before the last byte
        ctypes.memmove(arg_start, title.ljust(room - 1, b"\0") + b"\1", room)
        return
    if env_start != arg_end:
        title, env_end = title[: room - 1], arg_end
    for name, value in os.environb.items():
        os.putenv(name, value)
    title = title[: env_end - arg_start - 1] + b"\0"
    ctypes.memmove(arg_start, title, len(title))
