"""The command line: ``tapes run [options] -- COMMAND``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

import tapes
from tapes.environment import is_disabled
from tapes.errors import TapesError
from tapes.forks import this_process
from tapes.reporting.configured import HTTP, STATSD
from tapes.service import Service

_NOT_FOUND, _NOT_RUNNABLE = 127, 126  # the exit statuses of shells


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits, or becomes the command."""
    parser = argparse.ArgumentParser(prog="tapes", description="Metrics for services of many processes.")
    parser.add_argument("--version", action="version", version=f"tapes {tapes.__version__}")
    commands = parser.add_subparsers(dest="action", required=True)
    run = commands.add_parser(
        "run",
        help="run a command whose processes share their metrics",
        description="Start an aggregator and become COMMAND. Every process that COMMAND starts and that uses "
        "tapes connects to it. The aggregator exits 2 s after the last of them.",
        usage="tapes run [--http [HOST:]PORT] [--statsd ADDRESS] [--addr ADDR] -- COMMAND [ARGUMENT ...]",
    )
    option = run.add_argument
    option("--http", metavar="[HOST:]PORT", help="serve the metrics over HTTP; on loopback by default")
    option(
        "--statsd",
        metavar="ADDRESS",
        help="report to StatsD every 10 s: [tcp://]HOST[:PORT] or unix:///PATH, "
        "with any of ?prefix=NAME&interval=SECONDS&tags=1",
    )
    option("--addr", help="the aggregator's address (default: TAPES_ADDR, or in a private directory)")
    option("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        run.error("there is no command to run: tapes run -- COMMAND")
    _run(command, {HTTP: given.http, STATSD: given.statsd}, given.addr)


def _run(command: list[str], reporters: dict[str, str | None], addr: str | None) -> None:
    program = shutil.which(command[0])
    if program is None:
        sys.stderr.write(f"tapes: command not found: {command[0]!r}\n")
        sys.exit(_NOT_FOUND)
    os.environ.update({name: value for name, value in reporters.items() if value is not None})
    try:
        if not is_disabled():
            from tapes.distributed.supervision.rendezvous import ensure_aggregator

            ensure_aggregator(Service(this_process(), f"tapes run (pid {os.getpid()})"), addr)
    except TapesError as error:
        sys.exit(f"tapes: {error}")
    for name in reporters:
        os.environ.pop(name, None)  # the running aggregator reports already
    try:
        # Becoming the command, rather than its parent, passes on every signal and its exit status.
        os.execv(program, command)  # noqa: S606 - the command is the user's own
    except OSError as error:
        sys.stderr.write(f"tapes: {command[0]} can't be run ({error.strerror})\n")
        sys.exit(_NOT_RUNNABLE)
