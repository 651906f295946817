"""A detached aggregator as a fork of the process that starts it.

For an application that is frozen into one program, as by PyInstaller: there is no interpreter to start. The
child keeps nothing of the application but its memory: it closes every descriptor, among them the sockets that
the application listens on, takes the default action for every signal, and logs to standard error.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable

from tapes import forks

__all__ = ["close_all_but", "fork", "is_frozen"]

_MAX_DESCRIPTORS = 1 << 16


def is_frozen() -> bool:
    """Return whether ``sys.executable`` is the application and no interpreter."""
    return bool(getattr(sys, "frozen", False))


def fork(run: Callable[[], None], environment: dict[str, str], fd: int) -> None:
    """Run ``run`` in a child with nothing open but ``fd`` and standard error; wait for the child's end.

    Args:
        run: Ends its own process and goes on in a child of that.
        environment: What the child has in its environment.
        fd: The descriptor that stays open.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child uses no lock that a thread may hold
        pid = forks.fork_helper()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        gc.freeze()  # what the application has would close descriptors that are the aggregator's by then
        _reset_signals()
        close_all_but(fd)
        _reset_streams()
        os.environ.clear()
        os.environ.update(environment)
        run()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def close_all_but(fd: int) -> None:
    """Close all descriptors but ``fd`` and those of the standard streams."""
    os.closerange(3, fd)
    os.closerange(fd + 1, _MAX_DESCRIPTORS)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # KILL and STOP; those that Python keeps to itself
            if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _reset_streams() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if has_standard_error() else (0, 1, 2):
        os.dup2(nothing, fd)
    if nothing > 2:
        os.close(nothing)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for logger in (logging.root, *map(logging.getLogger, ("tapes", "tapes.distributed"))):
        logger.handlers.clear()
        logger.propagate = True


def has_standard_error() -> bool:
    """Return whether this process was started with a standard error."""
    return sys.__stderr__ is not None
