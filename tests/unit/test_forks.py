"""tapes.forks and tapes.threads: noticing forks, with hooks and without."""

from __future__ import annotations

import os
import sys
import types

import pytest

from tapes import forks, processes, threads
from tests.processes import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

C_FORK = """
import ctypes, os, tapes
from tapes import forks, processes
registry = tapes.Registry()
registry.counter("c").increment(7)
registry.gauge("g").set(5)
before = registry.lineage.identity
pid = ctypes.PyDLL(None).fork()  # runs no hooks, as in uWSGI
if pid == 0:
    try:
        assert registry.lineage.identity == before
        forks.detect_fork()
        forks.detect_fork()
        assert registry.lineage.identity != before
        (ancestor,) = registry.lineage.ancestors
        assert (ancestor.identity, ancestor.process.pid, ancestor.base) == (before, os.getppid(), 0)
        assert abs(forks.now_ns() - ancestor.version) < 5e9
        assert [m.total_state().up.value for m in ancestor.metrics if m.kind == "counter"] == [7]
        assert registry.counter("c").collect().up.value == 0
        registry.counter("c").increment(2)
        assert registry.get_stats().c.value == 9 and registry.get_stats().g.value == 5
        assert forks.fork_root().pid == os.getppid()
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
forks.detect_fork()
assert (registry.lineage.identity, registry.lineage.ancestors) == (before, ())
"""


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="needs a call into C that keeps the GIL")
def test_a_fork_in_c_is_noticed_by_its_pid(tmp_path):
    """A fork in C is noticed once in the child, by its pid, and never in the parent."""
    done = run_python(C_FORK, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
@pytest.mark.parametrize("has_pages", [True, False], ids=["pages", "no pages"])
def test_a_mark_is_of_one_process_alone(tmp_path, fork, has_pages):
    """Set in the parent, it is not in its children and their children; there it can be set again."""
    if sys.implementation.name == "pypy" and (fork != "os.fork" or has_pages):
        pytest.skip("needs a call into C that keeps the GIL, and an madvise() that may be refused")
    program = f"""
import ctypes, os
import tapes.fork_flag
from tapes.fork_flag import fork_flag
if not {has_pages}:
    tapes.fork_flag._WIPE_ON_FORK = 12345  # refused
one, other = fork_flag(), fork_flag()
assert isinstance(one, tapes.fork_flag._PidFlag) is not {has_pages}
assert not one[0] and not other[0]
one[0] = 1
assert one[0] and not other[0]
for generation in range(3):
    pid = {fork}()
    if pid:
        assert one[0]
        os._exit(os.waitpid(pid, 0)[1] != 0)
    assert not one[0] and not other[0]
    one[0] = 1
    assert one[0]
one[0] = 0
os._exit(bool(one[0]))
"""
    done = run_python(program, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_recorded_leaves_no_record(tmp_path):
    """A fork of a process that counted nothing is free; each generation has its own record otherwise."""
    program = """
import os, tapes
registry = tapes.Registry()
counter = registry.counter("c")
registry.gauge("produced", lambda: 1)
registry.get_stats()

def child(expected):
    pid = os.fork()
    if pid:
        raise SystemExit(os.waitpid(pid, 0)[1] >> 8)
    assert len(registry.lineage.ancestors) == expected, registry.lineage.ancestors

child(0)
counter.increment()
child(1)
child(1)
counter.increment()
child(2)
assert registry.get_stats().c.value == 2
assert len({ancestor.identity for ancestor in registry.lineage.ancestors}) == 2
"""
    done = run_python(program, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_processes_with_one_pid_are_distinguished_by_their_start():
    """Two processes with the same pid are distinguished by the time of their start."""
    this = forks.this_process()
    assert this == processes.process_of(os.getpid())
    assert processes.process_of(2**22 + 1).started == 0


@pytest.mark.parametrize(
    ("options", "can_run", "ends_with_a_hook"),
    [({}, False, True), ({"enable-threads": True}, True, True), ({b"enable-threads": b"true"}, True, True),
     ({"threads": b"2"}, True, False), ({"enable-threads": True, "threads": b"2"}, True, False)],
)  # fmt: skip
def test_where_threads_run_and_a_hook_comes_at_the_end(monkeypatch, options, can_run, ends_with_a_hook):
    """Threads run and a hook comes at the end everywhere but under uWSGI, whose options decide."""
    monkeypatch.delitem(sys.modules, "uwsgi", raising=False)
    assert threads.can_run()
    assert threads.ends_with_a_hook()
    monkeypatch.setitem(sys.modules, "uwsgi", types.SimpleNamespace(opt=options))
    assert threads.can_run() is can_run
    assert threads.ends_with_a_hook() is ends_with_a_hook


def test_a_worker_thread_runs_ends_and_knows_itself():
    """A native thread runs, ends, knows itself, and can be joined twice."""
    seen = []
    worker = threads.NativeThread(lambda: seen.append(worker.is_me()), "name")
    worker.start()
    assert worker.join(5)
    assert worker.join(5)
    assert seen == [True]
    assert not worker.is_me()
