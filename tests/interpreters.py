"""Runs the core's tests on every Python that is available, and prints the results.

    python -m tests.interpreters [--newest] [pytest arguments]

It looks for python3.11 to python3.15 and pypy3.11 on the path and among pyenv's versions. The newest CPythons
that are not installed come from Debian, see `tests.debian`. Each Python gets a virtual environment of its own
below .interpreters/. With ``--newest`` only the newest run, and a missing one is a failure.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import pathlib
import re
import shutil
import subprocess
import sys

from tests import debian

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUITES = ["tests/unit", "tests/properties", "tests/oracles", "tests/conformance"]
NEEDS = [
    "gevent; python_version >= '3.14'",  # where `make newest` runs test_forks too
    "hypothesis",
    "packaging",
    "prometheus-client",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "webtest",
]
NEWEST = [f"CPython {version}" for version in debian.NEWEST]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python that can run the tests.

    Attributes:
        name: Its implementation and version, as in ``CPython 3.14``.
        path: Its program.
        inside: The beginning of a command that runs it, where it needs one.
    """

    name: str
    path: str
    inside: tuple[str, ...] = ()


def candidates() -> dict[str, Interpreter]:
    """Return the Pythons that are installed, by their names."""
    names = [*(f"python3.{minor}" for minor in range(11, 16)), "pypy3", "pypy3.11"]
    paths = [shutil.which(name) for name in names]
    paths += glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python"))
    found: dict[str, Interpreter] = {}
    for path in filter(None, paths):
        code = "import platform as p; print(p.python_implementation(), p.python_version())"
        ran = subprocess.run([path, "-c", code], capture_output=True, text=True)
        known = re.fullmatch(r"(\w+) (3\.\d+)\.\S+", ran.stdout.strip())
        if ran.returncode == 0 and known and tuple(map(int, known[2].split("."))) >= (3, 11):
            name = f"{known[1]} {known[2]}"
            found.setdefault(name, Interpreter(name, path))
    return found


def newest(found: dict[str, Interpreter]) -> tuple[dict[str, Interpreter], str]:
    """Return the newest Pythons that are not among those ``found``, or why they can't be installed."""
    missing = [name for name in NEWEST if name not in found]
    if not missing:
        return {}, ""
    try:
        inside = debian.inside()
    except debian.Unavailable as why:
        return {}, str(why)
    return {name: Interpreter(name, f"/usr/bin/python{name.split()[1]}", inside) for name in missing}, ""


def environment(interpreter: Interpreter) -> pathlib.Path:
    """Return the virtual environment of a Python, with everything that the tests need."""
    folder = ROOT / ".interpreters" / interpreter.name.replace(" ", "-")
    needs = ["-e", ".[all]", *NEEDS]
    installed = folder / "installed.txt"
    content = "\n".join([*interpreter.inside, interpreter.path, *needs])
    if not installed.exists() or installed.read_text() != content:
        subprocess.run(
            [*interpreter.inside, interpreter.path, "-m", "venv", "--clear", str(folder)], check=True
        )
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *needs]
        done = subprocess.run([*interpreter.inside, *install], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{interpreter.name}: pip failed:\n{done.stderr[-2000:]}")
        installed.write_text(content)
    return folder


def run(interpreter: Interpreter, arguments: list[str]) -> str:
    """Run the tests and return pytest's last line."""
    folder = environment(interpreter)
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    base = [f"--basetemp=.interpreters/tmp-{folder.name}"]
    # Real parts are required in the main environment only; this one does not have them.
    kept = {name: value for name, value in os.environ.items() if name != "TAPES_REQUIRE_REAL"}
    ran = subprocess.run(
        [*interpreter.inside, *command, *base, *SUITES, *arguments], cwd=ROOT, env=kept, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if ran.returncode:
        sys.stdout.write(ran.stdout)
    last = (ran.stdout.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
    return f"{'passed' if ran.returncode == 0 else 'FAILED'}: {last}"


def main() -> None:
    """Run the tests on all Pythons; exit with 1 if one failed, or if none ran."""
    only_newest, arguments = sys.argv[1:2] == ["--newest"], sys.argv[1:]
    found = candidates()
    added, reason = newest(found)
    found.update(added)
    if only_newest:
        found = {name: found[name] for name in NEWEST if name in found}
        del arguments[0]
    results = {}
    for name, interpreter in sorted(
        found.items(), key=lambda item: (item[0].split()[0], len(item[0]), item[0])
    ):
        results[name] = run(interpreter, arguments)
        sys.stdout.write(f"{name}: {results[name]}\n")
        sys.stdout.flush()
    absent = [name for name in NEWEST if name not in found]
    for name in absent:
        sys.stdout.write(f"{name}: not run: {reason}\n")
    failed = any(result.startswith("FAILED") for result in results.values())
    sys.exit(failed or not results or (only_newest and bool(absent)))


if __name__ == "__main__":
    main()
