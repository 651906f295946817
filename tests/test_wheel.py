"""The wheel that users install is complete: it is built, installed into an empty directory, and used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zipfile

import pytest

import tapes
from tests.processes import ROOT, clean_environment


def run(*command, cwd):
    """Run a Python command in ``cwd`` and return its output; it must succeed."""
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=clean_environment(), capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of a wheel that is built from this checkout, without the network."""
    if not importlib.util.find_spec("hatchling"):
        absent = pytest.fail if os.environ.get("TAPES_REQUIRE_REAL") else pytest.skip
        absent("hatchling is not installed")
    directory = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(directory)]
    run("-m", "pip", "wheel", *options, str(ROOT), cwd=directory)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory that contains the installed wheel and nothing else."""
    directory = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(directory), str(wheel),
        cwd=directory)  # fmt: skip
    return directory


def run_installed(installed, program):
    """Run a program that imports tapes from the installed wheel; its dependencies are this environment's."""
    head = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import tapes\n"
        f"assert tapes.__file__.startswith({str(installed)!r}), tapes.__file__\n"
    )
    return run("-c", head + program, cwd=installed)


def test_the_wheel_contains_every_module_and_nothing_but_the_package(wheel):
    """The wheel has every module of tapes, ``py.typed`` and the license, and no file outside the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {name for name in names if name.startswith("tapes/")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tapes").rglob("*.py")}
    assert {name for name in package if name.endswith(".py")} == sources
    assert "tapes/py.typed" in package
    others = names - package
    assert {name.partition("/")[0] for name in others} == {f"tapes-{tapes.__version__}.dist-info"}
    assert any(name.endswith("/LICENSE") for name in others)


def test_the_metadata_of_the_wheel_has_version_entry_points_and_one_dependency(installed):
    """The wheel has the source's version, the command and the pytest plugin, and depends on addict only."""
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert (distribution.metadata["Name"], distribution.version) == ("tapes", tapes.__version__)
    assert distribution.metadata["Requires-Python"] == ">=3.11"
    assert {(point.group, point.name, point.value) for point in distribution.entry_points} == {
        ("console_scripts", "tapes", "tapes.cli:main"),
        ("pytest11", "tapes", "tapes.pytest_plugin"),
    }
    required = [line for line in distribution.requires or [] if "extra ==" not in line]
    assert [line.partition(">")[0] for line in required] == ["addict"]


def test_importing_tapes_from_the_wheel_loads_no_optional_dependency(installed):
    """``import tapes`` from the wheel works, counts, and loads neither zmq nor msgpack."""
    program = """
tapes.counter("jobs").increment(3)
print(tapes.get_stats().jobs.value, sorted({"zmq", "msgpack"} & set(sys.modules)))
"""
    assert run_installed(installed, program) == "3 []\n"


def test_the_command_of_the_wheel_shows_its_version(installed):
    """The ``tapes`` command that the wheel installs runs and shows the version."""
    script = installed / "bin" / "tapes"
    program = (
        f"import runpy; sys.argv[1:] = ['--version']; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    assert run_installed(installed, program) == f"tapes {tapes.__version__}\n"


def test_the_wheel_has_no_path_of_this_checkout(wheel):
    """No file of the wheel names the directory in which it was built."""
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if str(ROOT).encode() in archive.read(name)] == []
