"""Checks before 0MQ is used: libzmq aborts the process if it can't get a thread, a descriptor or memory.

So each resource that it is about to allocate is allocated and released first. A shortage becomes an
exception, and the process continues without a connection.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import zmq

from tapes.errors import AggregatorUnavailable
from tapes.threads import unpatched

_DESCRIPTORS = 16  # what a first socket needs, and some to spare
_THREADS = 3  # what a context needs, and one to spare
_BYTES = 48 << 20  # address space that a context and its sockets need: two stacks of 8 MB, and queues
_THREAD_END_SECONDS = 0.1  # maximum time to wait for the end of the threads
_PAUSE_SECONDS = 0.0005


def new_context() -> zmq.Context[Any]:
    """Return a context whose threads run, or raise `AggregatorUnavailable`."""
    check_descriptors()
    check_memory(_BYTES)
    _check_threads()
    context: zmq.Context[Any] = zmq.Context()
    context.socket(zmq.PAIR).close(linger=0)  # the threads start with the first socket
    return context


def check_descriptors() -> None:
    """Raise `AggregatorUnavailable` unless the descriptors for a first socket are free."""
    found = []
    try:
        for _ in range(_DESCRIPTORS):
            found.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise AggregatorUnavailable(
            f"no socket can be opened ({error.strerror})",
            remedy="close files, or raise the limit (ulimit -n)",
        ) from None
    finally:
        for fd in found:
            os.close(fd)


def check_memory(length: int) -> None:
    """Raise `AggregatorUnavailable` unless ``length`` bytes of address space are free."""
    try:
        mmap.mmap(-1, length).close()
    except OSError as error:
        raise AggregatorUnavailable(
            f"there is no memory for 0MQ ({error.strerror})",
            remedy=f"leave {length >> 20} MB of address space (ulimit -v), or raise the limit",
        ) from None


def _check_threads() -> None:
    finish: Any = unpatched("_thread", "allocate_lock")()
    finish.acquire()
    idents: list[int] = []

    def wait() -> None:
        idents.append(unpatched("_thread", "get_native_id")())
        with finish:
            pass

    started = 0
    try:
        for _ in range(_THREADS):
            unpatched("_thread", "start_new_thread")(wait, ())
            started += 1
    except RuntimeError:
        raise AggregatorUnavailable(
            "no thread can be started",
            remedy=f"leave room for {_THREADS} threads in each process "
            "(pids.max of the container, TasksMax of systemd, ulimit -u)",
        ) from None
    finally:
        finish.release()
        _await_end(idents, started)


def _await_end(idents: list[int], started: int) -> None:
    """Wait until the threads have ended: until then they count toward the limit."""
    sleep, deadline = unpatched("time", "sleep"), time.monotonic() + _THREAD_END_SECONDS
    while time.monotonic() < deadline:
        if len(idents) == started and not any(os.path.exists(f"/proc/self/task/{one}") for one in idents):
            return
        sleep(_PAUSE_SECONDS)
