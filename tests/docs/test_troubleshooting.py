"""Each message of the troubleshooting page is real."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import subprocess
import sys
import threading

import pytest

import tapes
from tapes import DistributedRegistry
from tapes.contrib._membership import Membership
from tapes.exposition import endpoint
from tapes.sharing import Pressure
from tests.processes import ROOT, clean_environment

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def section(heading):
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found


def rows(heading):
    """Return what is written and what is seen, of each row of four columns below ``heading``."""
    lines = [line for line in section(heading).splitlines() if line.startswith("| `")]
    found = [re.match(r"\| `([^`]+)` \| `([^`]+)` \| .* \| .* \|$", line) for line in lines]
    assert any(found)
    return [(match[1], match[2]) for match in found if match]


def seen_below(heading):
    """Return what is seen, of each row of three columns below ``heading``."""
    lines = [line for line in section(heading).splitlines() if line.count(" | ") == 2 and "| `" in line]
    return [re.match(r"\| `([^`]+)` \|", line)[1] for line in lines]


def assert_seen(expected, text):
    """Assert that ``text`` has what is ``expected``, in which an ellipsis stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in expected.split("…"))
    assert re.search(pattern, text), f"{expected!r} is not in {text!r}"


@pytest.fixture
def names(monkeypatch):
    """What the examples of the page use."""
    registry = tapes.Registry()
    for maker in ("counter", "gauge", "histogram", "meter", "timer"):
        monkeypatch.setattr(tapes, maker, getattr(registry, maker))
    made = {kind.kind[0]: getattr(registry, kind.kind)(kind.kind[0]) for kind in KINDS}
    return {"tapes": tapes, "registry": registry, **made}


KINDS = (tapes.Counter, tapes.Gauge, tapes.Histogram, tapes.Meter, tapes.Timer)


@pytest.mark.parametrize(("written", "seen"), rows("Calls"))
def test_a_wrong_call_is_an_error_with_the_message_of_the_page(names, written, seen):
    """It raises, and nothing is made or recorded."""
    before = names["registry"].get_stats()
    with pytest.raises((TypeError, ValueError, AttributeError)) as raised:
        exec(written, names)
    assert_seen(seen, str(raised.value))
    assert names["registry"].get_stats() == before


@pytest.mark.parametrize(("written", "seen"), rows("The log"))
def test_a_bad_value_is_logged_with_the_message_of_the_page(names, caplog, written, seen):
    """It raises nothing, is counted, and is logged once it is read."""
    with caplog.at_level(logging.WARNING):
        exec(written, names)
        stats = names["registry"].get_stats()
    assert stats.tapes.rejected.value == 1
    (message,) = caplog.messages
    assert_seen(seen, message)


@pytest.mark.parametrize(("written", "seen"), rows("The environment"))
def test_a_setting_is_logged_with_the_message_of_the_page(tmp_path, written, seen):
    """In a program that joins nothing, one line within some seconds."""
    settings = dict(setting.split("=", 1) for setting in written.split())
    program = "import tapes; tapes.counter('a').increment(); input()"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=clean_environment(**settings),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        line = process.stderr.readline()
        _, more = process.communicate("\n", timeout=60)
    assert_seen(seen, line)
    assert more == ""
    assert process.returncode == 0


def fails():
    return 1 / 0


def hangs():
    goes_on.wait(60)


goes_on = threading.Event()
IN_THE_LOG = {
    "'hits' has reached": lambda registry: [registry.counter("hits", path=str(n)) for n in range(3)],
    "tapes cut a label's value": lambda registry: registry.counter("hits", agent="x" * 2000),
    "its producer failed": lambda registry: registry.gauge("size", fails),
    "its producer has not returned": lambda registry: registry.gauge("size", hangs),
    "gauge 'size' got another producer": lambda registry: [registry.gauge("size", p) for p in (int, float)],
}


@pytest.mark.parametrize("seen", seen_below("Other lines of the log"))
def test_another_line_of_the_log_is_as_on_the_page(caplog, seen):
    """A line of the log has the text that the page on troubleshooting shows."""
    (cause,) = [cause for beginning, cause in IN_THE_LOG.items() if seen.startswith(beginning)]
    registry = tapes.Registry(max_series=2)
    goes_on.clear()
    try:
        cause(registry)
        registry.get_stats()
    finally:
        goes_on.set()
    assert_seen(seen, "\n".join(caplog.messages))


def refuse(error):
    def refusing(*_, **__):
        raise error

    return refusing


def many_readers(monkeypatch):
    pressure = Pressure(endpoint.MAX_READERS)
    monkeypatch.setattr(endpoint, "_pressure", pressure)
    for _ in range(endpoint.MAX_READERS):
        pressure._enter()
    return endpoint.answer(tapes.Registry())


def no_room(name, error):
    def cause(monkeypatch):
        monkeypatch.setattr(name, refuse(error))
        with contextlib.closing(DistributedRegistry("ipc:///tmp/nothing-listens.ipc")) as registry:
            registry.connect()
            return endpoint.answer(registry)

    return cause


def no_aggregator(monkeypatch):
    with contextlib.closing(DistributedRegistry("ipc:///tmp/nothing-listens.ipc")) as registry:
        registry.connect()
        return endpoint.answer(registry)


def turned_off(monkeypatch):
    monkeypatch.setenv("TAPES_DISABLED", "1")
    return Membership(tapes.Registry()).answer()


ANSWERS = {
    "the aggregator at": no_aggregator,
    "this process answers": many_readers,
    "no thread can be started": no_room("_thread.start_new_thread", RuntimeError("can't start new thread")),
    "there is no memory": no_room("mmap.mmap", OSError(errno.ENOMEM, "Cannot allocate memory")),
    "no socket can be opened": no_room("os.open", OSError(errno.EMFILE, "Too many open files")),
    "tapes is turned off": turned_off,
}


@pytest.mark.parametrize("seen", seen_below("Answers of 503"))
def test_an_answer_of_503_is_as_on_the_page(monkeypatch, seen):
    """An answer of 503 has the text that the page on troubleshooting shows."""
    (cause,) = [cause for beginning, cause in ANSWERS.items() if seen.startswith(beginning)]
    with monkeypatch.context() as patched:
        status, _, body = cause(patched)
    assert status == 503
    assert_seen(seen, body.decode())
