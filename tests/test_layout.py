"""Test files are named after what they test, stay short, and are where the documents say that they are."""

from __future__ import annotations

import ast
import re

import pytest

from tests.processes import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))
MODULES = {
    part.lstrip("_")
    for path in (ROOT / "tapes").rglob("*.py")
    for part in path.relative_to(ROOT).with_suffix("").parts
}
"""The names of all modules and packages of tapes."""

CLAIMS = {
    "bounds": "folding",
    "copies": "registry",
    "foreign_numbers": "sifting",
    "http_reporter": "http",
    "last_reports": "scheduled",
    "last_values": "gauge",
    "long_texts": "naming",
    "namespaces": "sweeping",
    "package": "tapes",
    "producers": "producing",
    "reentrancy": "folding",
    "strangers": "sifting",
    "time": "clock",
    "timed_results": "timing",
    "tornado_reporters": "tornado",
}
"""Files of tests/unit that are named after a claim, each with the module that it is about."""


def test_each_file_of_unit_tests_is_named_after_its_module():
    """A file in tests/unit is named after a module of tapes, or after a claim in `CLAIMS` about one."""
    found = {path.stem.removeprefix("test_") for path in (TESTS / "unit").glob("test_*.py")}
    assert found - MODULES == set(CLAIMS), "rename the file after its module, or correct CLAIMS"
    assert set(CLAIMS.values()) <= MODULES


def test_a_test_file_has_at_most_500_lines():
    """A file of tests has at most 500 lines; a longer one is split by claim."""
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert {path: lines for path, lines in lengths.items() if lines > 500} == {}


def test_each_test_has_a_docstring_that_is_a_sentence():
    """Each test has a docstring of six words or more, because a failure report shows it alone."""
    short = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if (
                is_function
                and node.name.startswith("test_")
                and len((ast.get_docstring(node) or "").split()) < 6
            ):
                short.append(f"{path.relative_to(ROOT)}::{node.name}")
    assert short == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "tests/README.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])  # fmt: skip
def test_test_files_that_a_document_names_exist(page):
    """Each file of tests that a document names exists, so that a reader of a guarantee finds its proof."""
    text = (ROOT / page).read_text()
    paths = {name for name in re.findall(r"tests/[\w/]+\.py", text) if not (ROOT / name).is_file()}
    names = set(re.findall(r"(?<![\w/])test_\w+\.py", text)) - {path.name for path in FILES}
    assert (paths, names) == (set(), set())


def test_the_example_of_a_crew_works(short_dir):
    """The example in tests/README.md passes as it is written."""
    (example,) = re.findall(r"```python\n(.*?)```", (TESTS / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec("from tests.crew import assert_all_counted, crew, stopped\n" + example, names)
    (test,) = (found for name, found in names.items() if name.startswith("test_"))
    test(short_dir)
