"""tapes.service: all processes of a service find the same supervisor, and the same places to meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tapes import forks, service
from tapes.processes import Process
from tests.processes import run_python

REPORT = "import json, os, tapes.service as s; print(json.dumps(s.this_service()[0]), flush=True)"


def supervisors(short_dir, program: str, *, name: str = "program.py", **environment: str) -> list[list[int]]:
    """Run a program whose processes print their supervisors; return the first line and the others."""
    (short_dir / name).write_text(program)
    done = run_python(
        f"import runpy; runpy.run_path({str(short_dir / name)!r}, run_name='__main__')",
        cwd=short_dir, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_and_grandchildren_of_multiprocessing_have_one_supervisor(short_dir, method):
    """By each start method, children of children find the process that the first of them descends from."""
    program = f"""
import multiprocessing, subprocess, sys
def report():
    exec({REPORT!r})
def child():
    report()
    grandchild = multiprocessing.get_context({method!r}).Process(target=report)
    grandchild.start()
    grandchild.join()
if __name__ == "__main__":
    report()
    process = multiprocessing.get_context({method!r}).Process(target=child)
    process.start()
    process.join()
"""
    (short_dir / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=short_dir, capture_output=True, text=True, timeout=60, check=True
    )
    first, *others = map(json.loads, done.stdout.splitlines())
    assert others == [first, first], done.stdout


def test_a_child_of_a_fork_has_the_root_of_the_first_fork(short_dir):
    """The fork of a fork has the supervisor of the first, even if the first has ended before it looks."""
    found = supervisors(
        short_dir,
        f"""
import os, tapes
{REPORT}
for _ in range(2):
    if os.fork():
        os.wait()
        os._exit(0)
{REPORT}
""",
    )
    assert found[0] == found[1]


def test_a_gunicorn_that_replaces_another_is_a_service_of_its_own(monkeypatch):
    """A gunicorn master that another one started (GUNICORN_PID) is a supervisor of its own."""
    commands = {10: b"gunicorn app", 20: b"gunicorn app", 30: b"gunicorn app"}
    parents = {30: 20, 20: 10, 10: 1}
    monkeypatch.setattr(service, "_command", lambda pid: commands.get(pid, b"init"))
    monkeypatch.setattr(service, "_parent", lambda pid: parents.get(pid, 0))
    assert service._made_by(30) == 20
    assert service._made_by(20) == 10
    assert service._made_by(10) == 0
    monkeypatch.setenv("GUNICORN_PID", "10")
    assert service._made_by(20) == 0


def test_a_gunicorn_worker_with_a_process_title_finds_its_master(monkeypatch):
    """A worker finds its gunicorn master although setproctitle changes the command lines."""
    commands = {10: b"gunicorn: master [app]\0", 20: b"gunicorn: worker [app]\0"}
    monkeypatch.setattr(service, "_command", lambda pid: commands.get(pid, b"init"))
    monkeypatch.setattr(service, "_parent", {20: 10, 10: 1}.get)
    assert service._made_by(20) == 10
    assert service._made_by(10) == 0


def test_the_name_of_a_private_directory_identifies_its_supervisor():
    """A private directory's name contains its supervisor; other names are not recognised."""
    for process in (Process(12, 345), forks.this_process()):
        assert service.root_of(service.directory_name(process, "/tmp")) == process
    for name in ("tapes", "tapes-1", "tapes-1-2-3", "tapes-1-2-0123456789abc", "tapes-a-b", "xtapes-1-2"):
        assert service.root_of(name) is None


def test_places_do_not_depend_on_the_state_of_a_directory(monkeypatch, tmp_path):
    """Processes list a directory as a place whether it exists or not, so all see the same list."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = service.parents()
    assert found[:3] == [str(tmp_path / "gone"), str(tmp_path), "/tmp"]
    assert f"/run/user/{os.geteuid()}" in found
    assert len(found) == len(set(found))


def test_a_large_directory_is_not_listed_for_each_read(tmp_path, monkeypatch):
    """A directory that has not changed is listed once for 100 lookups."""
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or real(path))
    monkeypatch.setattr(service, "_listings", {})
    long_ago = 1_000_000_000
    os.utime(tmp_path, ns=(long_ago, long_ago))
    for _ in range(100):
        assert service._names_in(str(tmp_path)) == []
    assert len(listed) == 1


def test_a_directory_that_appears_is_found_by_the_next_look(tmp_path, monkeypatch):
    """A private directory that appears is found at the next look, although listings are cached."""
    monkeypatch.setattr(service, "_listings", {})
    monkeypatch.setattr(service, "_LISTING_SHARE", 0)
    for number in range(20):
        (tmp_path / f"tapes-{number}-1").mkdir()
        assert len(service._names_in(str(tmp_path))) == number + 1
    assert service._names_in(str(tmp_path / "missing")) == []
