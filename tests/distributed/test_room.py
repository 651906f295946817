"""A process where 0MQ can't get a thread, memory or a descriptor continues; libzmq would abort it."""

from __future__ import annotations

import os
import pathlib
import resource
import sys

import pytest

from tests.processes import free_port, get, run_python, running, wait_for

GUNICORN = str(pathlib.Path(sys.executable).with_name("gunicorn"))
APPLICATION = """
from tapes.contrib.wsgi import TapesMiddleware

def app(environ, start_response):
    start_response("200 OK", [])
    return [b"ok"]

app = TapesMiddleware(app)
"""
UNDER_A_LIMIT = """
import os, resource, sys, threading
import tapes.distributed.connection
from tapes.distributed.transport.preflight import new_context
from tapes.errors import AggregatorUnavailable

os.setgid({uid})
os.setuid({uid})
resource.setrlimit(resource.RLIMIT_NPROC, (1 + {threads},) * 2)
try:
    context = new_context()
except AggregatorUnavailable as error:
    print(error)
else:
    print("a context")
    context.destroy(linger=0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without other processes")
@pytest.mark.parametrize("threads", range(6))
def test_a_context_is_made_only_where_its_threads_can_be_started(tmp_path, threads):
    """Under a limit of processes, new_context() succeeds or raises, and never aborts the process."""
    uid = 40_000 + os.getpid() % 20_000  # the limit counts all processes of a user
    done = run_python(UNDER_A_LIMIT.format(uid=uid, threads=threads), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    if threads >= 3:
        assert done.stdout == "a context\n"
    else:
        assert done.stdout.startswith("no thread can be started; leave room for 3 threads in each process")


@pytest.mark.parametrize("megabytes", [60, 90, 120, 160, 220, 300])
def test_a_worker_with_little_memory_answers_every_request(home, megabytes):
    """A worker with little address space serves every request; ``/metrics`` explains why it can't join."""
    (home.directory / "app.py").write_text(APPLICATION)
    port = free_port()
    command = [
        sys.executable, "-c",
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]) << 20,) * 2); "
        "os.execv(sys.argv[2], sys.argv[2:])",
        str(megabytes), GUNICORN, "-w", "2", "-b", f"127.0.0.1:{port}", "app:app",
    ]  # fmt: skip
    with running(command, cwd=home.directory, **home.environment):
        wait_for(lambda: get(port, "/")[0] == 200, "it is up")
        assert [get(port, "/")[0] for _ in range(40)] == [200] * 40

        def answers_or_explains():
            status, _, body = get(port, "/metrics")
            return status == 200 or (status == 503 and b"; " in body)

        wait_for(answers_or_explains, "the worker has joined, or shows why it can't")
        log = (home.directory / "output.log").read_text()
        assert log.count("Booting worker") == 2, log
        assert "src/" not in log, log


def test_missing_memory_is_an_error_and_not_an_abort(tmp_path):
    """check_memory() raises if that much address space is not free."""
    source = """
import resource
from tapes.distributed.transport.preflight import check_memory
from tapes.errors import AggregatorUnavailable
check_memory(1 << 20)
resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
try:
    check_memory(1 << 28)
except AggregatorUnavailable as error:
    print(error)
"""
    done = run_python(source, cwd=tmp_path)
    assert done.stdout == (
        "there is no memory for 0MQ (Cannot allocate memory); leave 256 MB of address space (ulimit -v), "
        "or raise the limit\n"
    ), done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
