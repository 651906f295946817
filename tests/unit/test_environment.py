"""The labels that the environment gives to the default registry."""

from __future__ import annotations

import pytest

from tapes.environment import configured_labels
from tapes.errors import InvalidArgument
from tests.processes import run_python

PROGRAM = """
import tapes
tapes.counter("a").increment()
tapes.counter("b", region="us").increment()
tapes.Registry().counter("c")
print(sorted(tapes.get_stats().a), sorted(tapes.get_stats().b))
"""


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", {}),
        ("region=eu", {"region": "eu"}),
        (" region = eu , service=a=b ", {"region": "eu", "service": "a=b"}),
    ],
)
def test_labels_are_pairs_with_commas_between(monkeypatch, text, labels):
    """Blanks around them do not count; a value may have a '=' in it."""
    monkeypatch.setenv("TAPES_LABELS", text)
    assert configured_labels() == labels


@pytest.mark.parametrize("text", ["region", "region=", "=eu", "region=eu,", "a=1,a=2", ",", "region:eu"])
def test_what_is_no_pair_is_refused(monkeypatch, text):
    """A key and a value are needed, each key once."""
    monkeypatch.setenv("TAPES_LABELS", text)
    with pytest.raises(InvalidArgument, match=r"TAPES_LABELS: got .*expected KEY=VALUE,KEY=VALUE"):
        configured_labels()


def test_the_default_registry_has_them(tmp_path):
    """Every series of the default registry; a label of the metric's own wins."""
    done = run_python(PROGRAM, cwd=tmp_path, TAPES_LABELS="region=eu,service=shop")
    assert done.stderr == ""
    assert done.stdout == """['{region="eu",service="shop"}'] ['{region="us",service="shop"}']\n"""


@pytest.mark.parametrize("text", ["region", "__region=eu", "9=eu"])
def test_labels_that_cannot_be_used_are_one_warning(tmp_path, text):
    """One line that says what was given and what is expected; the application records without labels."""
    done = run_python(PROGRAM, cwd=tmp_path, TAPES_LABELS=text)
    assert done.stdout == """['value'] ['{region="us"}']\n"""
    (line,) = done.stderr.splitlines()
    assert "TAPES_LABELS" in line
    assert "expected" in line
