"""Each message of the troubleshooting page is real."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

import tapes
from tests.processes import ROOT, clean_environment

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def rows(heading):
    """Return what is written and what is seen, of each row of the table below ``heading``."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    found = [re.match(r"\| `([^`]+)` \| `([^`]+)` \| .* \| .* \|$", line) for line in lines]
    assert found
    assert all(found), lines
    return [(match[1], match[2]) for match in found]


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
    if "context manager" in seen and sys.version_info < (3, 11):
        pytest.skip("it is another message of Python's there")
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
