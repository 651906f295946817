"""Starting an aggregator as a fork of the process that starts it.

This is for an application that is frozen into one program, as by PyInstaller: it has no interpreter to start.
The child shares only its memory with the application. It closes every descriptor, also the sockets that the
application listens on, resets every signal handler, and logs to standard error.
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


def fork(run: Callable[[], None], environment: dict[str, str], fd: int) -> None:
    """Run ``run`` in a child with nothing open but ``fd`` and standard error; wait for the child's end.

    ``run`` forks, and ends the process that called it.
    """
    with warnings.catch_warnings():
        # The child uses no lock that another thread may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = forks.fork_helper()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        gc.freeze()  # finalizers of the application's objects would close descriptors of the aggregator
        _reset_signals()
        os.closerange(3, fd)
        os.closerange(fd + 1, 1 << 16)
        _reset_streams()
        os.environ.clear()
        os.environ.update(environment)
        run()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # KILL, STOP, and those that Python reserves
            if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _reset_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if has_standard_error() else (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for logger in (logging.root, *map(logging.getLogger, ("tapes", "tapes.distributed"))):
        logger.handlers.clear()
        logger.propagate = True


def has_standard_error() -> bool:
    """Return whether this process was started with a standard error stream."""
    return sys.__stderr__ is not None
