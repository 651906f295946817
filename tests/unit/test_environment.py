"""tapes.environment: the labels that the default registry gets from TAPES_LABELS."""

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
def test_labels_are_pairs_separated_by_commas(monkeypatch, text, labels):
    """Blanks around keys and values are ignored; a value may contain '='."""
    monkeypatch.setenv("TAPES_LABELS", text)
    assert configured_labels() == labels


@pytest.mark.parametrize("text", ["region", "region=", "=eu", "region=eu,", "a=1,a=2", ",", "region:eu"])
def test_a_malformed_pair_is_an_error(monkeypatch, text):
    """Each pair needs a key and a value, and each key may occur once."""
    monkeypatch.setenv("TAPES_LABELS", text)
    with pytest.raises(InvalidArgument, match=r"TAPES_LABELS: got .*expected KEY=VALUE,KEY=VALUE"):
        configured_labels()


def test_the_default_registry_has_the_labels(tmp_path):
    """Every series of the default registry has the labels; a metric's own label of the same name wins."""
    done = run_python(PROGRAM, cwd=tmp_path, TAPES_LABELS="region=eu,service=shop")
    assert done.stderr == ""
    assert done.stdout == """['{region="eu",service="shop"}'] ['{region="us",service="shop"}']\n"""


@pytest.mark.parametrize("text", ["region", "__region=eu", "9=eu"])
def test_unusable_labels_are_logged_once(tmp_path, text):
    """Unusable labels cause one line of log, with what was set and what is expected, and are ignored."""
    done = run_python(PROGRAM, cwd=tmp_path, TAPES_LABELS=text)
    assert done.stdout == """['value'] ['{region="us"}']\n"""
    (line,) = done.stderr.splitlines()
    assert "TAPES_LABELS" in line
    assert "expected" in line
