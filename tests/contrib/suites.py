"""Runs the public test suites of the frameworks, bare and with the adapter around every application.

    python -m tests.contrib.suites [flask] [werkzeug] [starlette] [tornado]

A test that passes without the adapter must pass with it. The tests are those of the installed version: its
source distribution is fetched from the package index. The requirements of the tests are installed into a new
environment that sees the packages of this one. Both are deleted afterwards.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from tests.processes import clean_environment, running

PLUGIN = "tapes_suite_plugin"
# For tests that are part of the installed package: a configuration in a directory above them is not theirs.
# The filters are those of Tornado's own runner.
INI = """[pytest]
filterwarnings =
    error
    ignore::DeprecationWarning
    ignore::pytest.PytestCollectionWarning
"""
SECONDS = 600
_SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A project's suite.

    Attributes:
        needs: Requirements of its tests that may not be installed.
        measured: Minimum number of measured requests; two thirds of the number when this was written.
        options: Further arguments of pytest.
        is_installed: Whether the tests are part of the installed package.
    """

    needs: str
    measured: int
    options: tuple[str, ...] = ()
    is_installed: bool = False


SUITES = {
    # Flask's tests use a private name that pytest 9.1 dropped.
    "flask": Suite("pytest<9.1 asgiref greenlet python-dotenv", 300),
    # Without watchdog: the suite's test of it waits for ever, as watchdog 7.1 reports no change.
    "werkzeug": Suite("pytest cffi cryptography ephemeral-port-reserve", 200),
    "starlette": Suite(
        "pytest blockbuster httpx<0.29 httpx2[zstd] importlib-metadata itsdangerous jinja2 opentelemetry-sdk "
        "python-multipart pyyaml trio",
        1000,
    ),
    "tornado": Suite("pytest", 800, ("-c", "pytest.ini", "-o", "python_files=*_test.py"), is_installed=True),
}

EXCLUDED: dict[str, dict[str, str]] = {}  # by suite: tests that run in neither mode, with the reason


class Unavailable(Exception):
    """The tests of a suite, or their requirements, can't be fetched."""


@dataclasses.dataclass
class Ran:
    """One run of a suite.

    Attributes:
        outcomes: The outcome of each test: passed, failed, skipped, or collected if it never ran.
        measured: Number of measured requests.
        active: Number of requests that were still active at its end.
        output: The output of pytest.
        seconds: Its duration.
    """

    outcomes: dict[str, str]
    measured: int
    active: float
    output: str
    seconds: float

    def those(self, outcome: str) -> set[str]:
        """Return the tests with this outcome."""
        return {test for test, found in self.outcomes.items() if found == outcome}

    def __str__(self) -> str:
        counts = [f"{len(self.those(outcome))} {outcome}" for outcome in ("passed", "failed", "skipped")]
        return f"{len(self.outcomes)} tests: {', '.join(counts)} in {self.seconds:.0f} s"


@dataclasses.dataclass
class Compared:
    """A suite's run with the adapter beside its bare run.

    Attributes:
        worse: Tests that were worse with the adapter in every run.
        once: Tests that were worse in one run only.
        faults: Other problems of the adapter, or of the comparison.
        output: The output of pytest in the last run with the adapter.
    """

    bare: Ran
    wrapped: Ran
    worse: set[str]
    once: set[str]
    faults: list[str]
    output: str

    def __str__(self) -> str:
        requests = f"{self.wrapped.measured} requests measured, {self.wrapped.active:.0f} still active"
        lines = [f"  bare     {self.bare}", f"  adapter  {self.wrapped}; {requests}"]
        lines += [f"  failed in both: {test}" for test in sorted(self.bare.those("failed"))]
        lines += [f"  WORSE WITH THE ADAPTER: {test}" for test in sorted(self.worse)]
        lines += [f"  worse with the adapter, but not again: {test}" for test in sorted(self.once)]
        return "\n".join(lines + [f"  FAULT: {fault}" for fault in self.faults])


class Workplace:
    """A suite's tests and their environment, in a directory that was empty.

    Raises:
        Unavailable: If something can't be fetched.
    """

    def __init__(self, name: str, directory: pathlib.Path) -> None:
        self.name, self.suite, self.directory = name, SUITES[name], directory
        self._runs = 0
        self._make_environment()
        self.root = directory if self.suite.is_installed else self._unpacked()
        self.home, self.tests = self.root, "tests"  # the test ids begin below home
        if self.suite.is_installed:
            spec = importlib.util.find_spec(f"{name}.test")
            self.home, self.tests = pathlib.Path(spec.origin).parent, "."  # type: ignore
            (directory / "pytest.ini").write_text(INI)

    def _pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
        try:
            ran = subprocess.run(
                command, cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                env=clean_environment(), timeout=300, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{self.name}: {error}") from None
        if ran.returncode:
            raise Unavailable(f"{self.name}: pip {arguments[-1]}: {ran.stderr.strip()[-500:]}")

    def _make_environment(self) -> None:
        place = self.directory / "env"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=60)
        self.python = place / "bin" / "python"
        (packages,) = place.glob("lib/*/site-packages")
        ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        lines = [f"import site; site.addsitedir({path!r})\n" for path in sorted(ours)]
        start = f"import os; 'TAPES_SUITE_CHILD' in os.environ and __import__({PLUGIN!r}).wrap_in_child()\n"
        (packages / "ours.pth").write_text("".join([*lines, start]))
        shutil.copy(pathlib.Path(__file__).with_name("suite_plugin.py"), packages / f"{PLUGIN}.py")
        self._pip("--python", str(self.python), "install", "--quiet", *self.suite.needs.split())

    def _unpacked(self) -> pathlib.Path:
        """Return a directory with the project's tests, and without its sources."""
        wanted = f"{self.name}=={importlib.metadata.version(self.name)}"
        self._pip("download", "--no-deps", "--no-binary", self.name, "-d", ".", wanted)
        (archive,) = self.directory.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(self.directory / "source", **_SAFELY)
        (root,) = (self.directory / "source").iterdir()
        for sources in ("src", self.name):  # the tests have to import the installed package
            shutil.rmtree(root / sources, ignore_errors=True)
        return root

    def run(self, wraps: bool, tests: Iterable[str] = ()) -> Ran:
        """Run the suite, or some files of it."""
        self._runs += 1
        place = self.directory / f"run{self._runs}"
        (place / "children").mkdir(parents=True)
        command = [
            str(self.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", PLUGIN,
            "--timeout=60", "--basetemp", str(place / "tmp"), "--rootdir", str(self.root),
            *self.suite.options,
            *(f"--deselect={test}" for test in EXCLUDED.get(self.name, {})),
            *(str(self.home / path) for path in tests or [self.tests]),
        ]  # fmt: skip
        more = {f"TAPES_SUITE_{name.upper()}": str(place / name) for name in ("outcomes", "children")}
        more |= {"TAPES_SUITE_WRAPS": self.name} if wraps else {}
        began = time.monotonic()
        with running(command, cwd=self.root, **more) as process:
            process.wait(SECONDS)
        output = (self.root / "output.log").read_text(errors="replace")
        if not (place / "outcomes").exists():
            raise AssertionError(f"the suite of {self.name} did not run: {output[-3000:]}")
        found = json.loads((place / "outcomes").read_text())
        return Ran(**found, output=output, seconds=time.monotonic() - began)


def compare(name: str, directory: pathlib.Path) -> Compared:
    """Run a suite bare and with the adapter; run the files that differ once more, in both modes."""
    workplace = Workplace(name, directory)
    bare, wrapped = workplace.run(wraps=False), workplace.run(wraps=True)
    first = worse = _worse(bare, wrapped)
    output = wrapped.output
    if first:  # the whole files, as a test may depend on those before it
        files = sorted({test.partition("::")[0] for test in first})
        again = workplace.run(wraps=False, tests=files), workplace.run(wraps=True, tests=files)
        worse = first & _worse(*again) | first - again[1].outcomes.keys()
        output = again[1].output
    faults = []
    if wrapped.outcomes.keys() != bare.outcomes.keys():
        faults.append(f"other tests were found: {sorted(wrapped.outcomes.keys() ^ bare.outcomes.keys())}")
    if len(bare.those("passed")) < 9 * len(bare.those("failed") | bare.those("collected")):
        faults.append("too few tests pass without the adapter to compare anything")
    if wrapped.measured < SUITES[name].measured or bare.measured:
        faults.append(f"{wrapped.measured} requests were measured with the adapter, {bare.measured} without")
    return Compared(bare, wrapped, worse, first - worse, faults, output)


def _worse(bare: Ran, wrapped: Ran) -> set[str]:
    return (bare.those("passed") - wrapped.those("passed")) | (wrapped.those("failed") - bare.those("failed"))


def main(names: list[str]) -> int:
    """Compare these suites, or all; return 1 if one is worse with the adapter."""
    status = 0
    for name in names or SUITES:
        with tempfile.TemporaryDirectory(prefix="tt") as directory:
            compared = compare(name, pathlib.Path(directory))
        status |= bool(compared.worse or compared.faults)
        print(f"{name} {importlib.metadata.version(name)}\n{compared}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
