"""Metrics as lines of JSON, to a stream."""

from __future__ import annotations

import io
import json
import sys
from datetime import timedelta

import tapes
from tapes.reporting.stream import ThreadedStreamReporter
from tests.processes import run_python, wait_for


def test_a_line_is_the_tree(registry):
    """One at the start, one at the end, each whole and flushed."""
    stream = io.StringIO()
    registry.timer("a.b", l="x\ny").update(0.5)
    with ThreadedStreamReporter(timedelta(hours=1), stream, registry):
        wait_for(stream.getvalue, "the first line")
        registry.timer("a.b", l="x\ny").update(0.5)
    first, last = map(json.loads, stream.getvalue().splitlines())
    assert first["a"]["b"]['{l="x\\ny"}']["count"] == 1
    assert last == registry.get_stats()


def test_the_default_is_standard_output(short_dir):
    """Lines go to standard output by default, also if it is a pipe and the reporter is never stopped."""
    program = """
import datetime, tapes
from tapes.reporting.stream import ThreadedStreamReporter
tapes.counter("c").increment()
ThreadedStreamReporter(datetime.timedelta(seconds=10)).start()
"""
    done = run_python(program, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1]) == {"c": {"value": 1}}


def test_a_stream_that_was_closed_ends_nothing(registry, caplog):
    """A closed stream is a failed report, and does not end the schedule."""
    stream = io.StringIO()
    stream.close()
    with ThreadedStreamReporter(timedelta(milliseconds=5), stream, registry):
        failed = lambda: registry.snapshot().get("tapes.reports.failed", reporter="ThreadedStreamReporter")  # noqa: E731
        wait_for(lambda: failed() and failed().value > 3, "failures are counted")
    assert len(caplog.records) == 1


def test_the_default_stream_is_that_of_the_signature():
    """The stream is the second positional argument, and standard output by default."""
    reporter = ThreadedStreamReporter(timedelta(seconds=1), sys.stderr)
    assert reporter.stream is sys.stderr
    assert reporter.registry is tapes.registry.default_registry
