"""A gunicorn configuration that makes every worker answer for the whole service.

    gunicorn -w 4 -c python:tapes.contrib.gunicorn_conf app:app

It starts an aggregator beside gunicorn's master, connects every worker to it, and says goodbye when a worker
exits; the aggregator leaves by itself when master and workers are gone. To have settings of your own, write a
configuration that imports these hooks::

    from tapes.contrib.gunicorn_conf import *

    bind = "127.0.0.1:8000"

gunicorn takes every public global of this module that is named like a setting as a setting: so helpers
start with an underscore.
"""

import os as _os
import sys as _sys
from typing import Any as _Any

import tapes as _tapes

__all__ = ["on_starting", "post_fork", "worker_exit"]


def on_starting(server: _Any) -> None:
    """Start the aggregator; if that can't be done, end gunicorn with a sentence that says why."""
    try:
        from tapes.distributed.lease import launch

        _os.environ["TAPES_ADDR"] = launch(_os.getpid())
    except _tapes.TapesError as error:
        if server.pidfile is not None:
            server.pidfile.unlink()
        _sys.exit(f"tapes: {error}")


def post_fork(server: _Any, worker: _Any) -> None:
    """Connect the worker to the aggregator."""
    _tapes.connect()


def worker_exit(server: _Any, worker: _Any) -> None:
    """Hand the worker's last counts to the aggregator."""
    _tapes.close()
