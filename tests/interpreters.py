"""Runs the suite of the core on every Python that is on the machine, and prints what ran.

    python tests/interpreters.py [pytest arguments]

Looks for python3.9 to python3.14 and pypy3, on the path and among pyenv's versions. Each gets a virtual
environment of its own below .interpreters/.
"""

from __future__ import annotations

import glob
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
SUITES = ["tests/unit", "tests/properties", "tests/oracles", "tests/conformance"]
NEEDS = ["hypothesis", "packaging", "prometheus-client", "pytest>=8", "pytest-timeout", "webtest"]


def candidates() -> dict[str, str]:
    """Return the version of every interpreter that can be used, and its path."""
    names = [*(f"python3.{minor}" for minor in range(9, 15)), "pypy3", "pypy3.10", "pypy3.11"]
    paths = [shutil.which(name) for name in names]
    paths += glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python"))
    found: dict[str, str] = {}
    for path in paths:
        code = "import platform as p; print(p.python_implementation(), p.python_version())"
        ran = subprocess.run([path or "false", "-c", code], capture_output=True, text=True)
        known = re.fullmatch(r"(\w+) (3\.\d+)\.\S+", ran.stdout.strip())
        if ran.returncode == 0 and known and tuple(map(int, known[2].split("."))) >= (3, 9):
            found.setdefault(f"{known[1]} {known[2]}", str(path))
    return found


def run(name: str, path: str, arguments: list[str]) -> str:
    """Run the suite and return pytest's last line."""
    environment = ROOT / ".interpreters" / name.replace(" ", "-")
    if not environment.exists():
        subprocess.run([path, "-m", "venv", str(environment)], check=True)
        install = [
            str(environment / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "-q",
            "-e",
            ".[asgi,distributed,flask,tornado]",
        ]
        subprocess.run([*install, *NEEDS], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    base = [f"--basetemp=.interpreters/tmp-{environment.name}"]
    ran = subprocess.run([*command, *base, *SUITES, *arguments], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        sys.stdout.write(ran.stdout)
    return f"{'passed' if ran.returncode == 0 else 'FAILED'}: {ran.stdout.strip().splitlines()[-1]}"


def main() -> None:
    results = {}
    for name, path in sorted(
        candidates().items(), key=lambda item: (item[0].split()[0], len(item[0]), item[0])
    ):
        results[name] = run(name, path, sys.argv[1:])
        sys.stdout.write(f"{name}: {results[name]}\n")
        sys.stdout.flush()
    sys.exit(any(result.startswith("FAILED") for result in results.values()) or not results)


if __name__ == "__main__":
    main()
