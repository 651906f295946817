"""Type checkers report mistakes in calls of tapes at their lines."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.processes import ROOT

PROGRAM = pathlib.Path(__file__).with_name("mistakes.py")


def run(directory, *command):
    """Run a type checker as a user does: on a program of their own, without the settings of this project."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=directory, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def lines_of_mypy(path, directory):
    cache = ROOT / ".mypy_cache" / "of_users"
    output = run(
        directory, "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", "--no-pretty", str(path)
    )
    return {int(line) for line in re.findall(r"^[^:]+:(\d+): error:", output, re.MULTILINE)}


def lines_of_pyright(path, directory):
    output = run(directory, "pyright", "--pythonpath", sys.executable, "--outputjson", str(path))
    found = json.loads(output)
    assert found["summary"]["filesAnalyzed"] == 1, output  # it skips directories whose names begin with a dot
    errors = [each for each in found["generalDiagnostics"] if each["severity"] == "error"]
    return {each["range"]["start"]["line"] + 1 for each in errors}


CHECKERS = [
    pytest.param(lines_of_mypy, id="mypy"),
    pytest.param(lines_of_pyright, id="pyright", marks=pytest.mark.needs("node")),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lines_of", CHECKERS)
def test_each_mistake_is_reported_at_its_line(lines_of, short_dir):
    """mypy and pyright report each line of mistakes.py that is marked as a mistake, and no other line."""
    program = shutil.copy(PROGRAM, short_dir)
    marked = {n for n, line in enumerate(PROGRAM.read_text().splitlines(), 1) if "# mistake" in line}
    assert len(marked) > 20
    assert lines_of(program, short_dir) == marked


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lines_of", CHECKERS)
def test_the_public_interface_has_no_type_errors(lines_of, short_dir):
    """The program that uses the whole public interface has no errors for mypy and pyright."""
    program = shutil.copy(ROOT / "typing_tests" / "api.py", short_dir)
    assert lines_of(program, short_dir) == set()
