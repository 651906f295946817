"""The README's and the documentation's programs run and print what they say; so do docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys

import pytest

import tapes
from tests.processes import EXAMPLES, ROOT, clean_environment, run_python

FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def programs(text):
    """Yield each Python block with the text block that follows it at once, if any."""
    blocks = [(m.group(1), m.group(2), m.start(), m.end()) for m in FENCE.finditer(text)]
    for number, (language, source, _, end) in enumerate(blocks):
        if language == "python":
            following = blocks[number + 1 : number + 2]
            printed = None
            if following and following[0][0] == "text" and not text[end : following[0][2]].strip():
                printed = following[0][1]
            yield source, printed


def test_the_readmes_first_program_prints_what_it_says(tmp_path):
    """At most 15 lines, in a process of its own."""
    source, printed = next(programs((ROOT / "README.md").read_text()))
    assert len(source.splitlines()) <= 15
    done = run_python(source, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


@pytest.mark.parametrize("page", ["quickstart.md", "metrics.md", "exposing.md", "reporters.md", "testing.md"])
def test_a_page_prints_what_it_says(tmp_path, page):
    """Its programs, one after the other, in one process."""
    blocks = list(programs((ROOT / "docs" / page).read_text()))
    done = run_python("\n".join(source for source, _ in blocks), cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout == "".join(printed or "" for _, printed in blocks)


def rows(page):
    """Yield the cells of each row of the tables of a page that say what to import."""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("| ") and "import " in line:
            yield [cell.strip() for cell in line.strip("| ").split("|")]


@pytest.mark.parametrize("page", ["README.md", "docs/adapters.md"])
def test_the_imports_and_the_extras_of_the_tables_are_there(page):
    """Each import of a table of adapters or reporters works; each extra is declared and brings something."""
    extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert all(extras.values())
    imported = named = 0
    for cells in rows(page):
        for statement in re.findall(r"`((?:from \S+ )?import [\w.]+)`", cells[1]):
            exec(statement, {})  # the page is our own
            imported += 1
        for extra in re.findall(r"tapes\[(\w+)\]", " ".join(cells)):
            assert extra in extras
            named += 1
    assert imported >= 9
    assert named >= 8


def test_every_extra_that_an_error_names_is_there():
    """MissingExtra says what to install, so that exists."""
    extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    sources = "".join(path.read_text() for path in (ROOT / "tapes").rglob("*.py"))
    named = set(re.findall(r'MissingExtra\(\s*"[^"]+",\s*"(\w+)"', sources))
    assert {"asgi", "distributed", "flask", "tornado"} <= named <= set(extras)


def test_the_first_half_of_the_readme_says_who_may_read():
    """The metrics are open by default, and what closes them stands next to the first service."""
    readme = (ROOT / "README.md").read_text()
    assert readme.index("`/metrics` is open") < readme.index("TAPES_METRICS_TOKEN") < len(readme) / 2


def test_the_tornado_program_of_the_documentation_is_the_example():
    """Which is run elsewhere; here, that they have not drifted apart."""
    (source,) = (s for s, _ in programs((ROOT / "docs" / "setup.md").read_text()) if "tornado" in s)
    example = (EXAMPLES / "tornado_original.py").read_text()
    for line in source.splitlines():
        if line.strip() and not line.startswith(("ioloop", "server.bind")):
            assert line in example


def test_the_program_of_the_front_page_prints_what_it_says(tmp_path):
    """Its processes count into one service, whose aggregator logs to standard error that it listens."""
    source, printed = next(programs((ROOT / "docs" / "index.md").read_text()))
    assert len(source.splitlines()) <= 15
    done = run_python(source, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def test_every_file_that_the_guarantees_name_exists():
    """Each guarantee names its tests; a name without a folder is in the folder of the name before it."""
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs" / "guarantees.md").read_text(), re.MULTILINE)
    named = [re.findall(r"`(?:(tests/\w+)/)?(test_\w+\.py)`", row) for row in rows]
    assert sum(map(len, named)) > 30
    for files in named:
        folder = ""
        for given, file in files:
            folder = given or folder
            assert (ROOT / folder / file).exists(), f"{folder}/{file}"


def modules():
    return ["tapes", *(m.name for m in pkgutil.walk_packages(tapes.__path__, "tapes."))]


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_docstrings_run(name):
    """The examples in the docstrings of a module give the results that are written there."""
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_ctrl_c_ends_the_demo_that_stays_up_quietly(tmp_path):
    """On a terminal, pressed twice: no traceback, status 0, and its parent is not interrupted."""
    on_a_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    shell = ["sh", "-c", f"'{sys.executable}' demo.py; echo ended with $?"]
    with subprocess.Popen(
        [sys.executable, "-c", on_a_terminal, *shell],
        cwd=EXAMPLES, env=clean_environment(TMPDIR=str(tmp_path), SERVE="1"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        shown = b""
        while b"format=prometheus" not in shown:
            piece = os.read(process.stdout.fileno(), 65536)
            assert piece, shown.decode()
            shown += piece
        process.stdin.write(b"\x03\x03")
        process.stdin.flush()
        shown = (shown + process.stdout.read()).decode()
        assert process.wait(30) == 0, shown
    assert shown.rstrip().endswith("ended with 0"), shown
    assert "Traceback" not in shown
    assert "nothing is left behind" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_demo_agrees_and_ends_with_status_0(tmp_path):
    """Sent and merged, route by route; nothing is left behind."""
    done = subprocess.run(
        [sys.executable, "demo.py"], cwd=EXAMPLES, env=clean_environment(TMPDIR=str(tmp_path)),
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sent and merged agree" in done.stdout
    assert "nothing is left behind" in done.stdout
    for column in ("sent", "m1", "q50", "q99"):
        assert column in done.stdout
    assert list(tmp_path.iterdir()) == []
