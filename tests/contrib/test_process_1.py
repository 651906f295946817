"""A service whose first process is process 1 of a pid namespace: when it exits, all others are killed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tests.contrib.services import Service, gone_requests
from tests.processes import Home, children, get, running, wait_for
from tests.receivers import Receiver

NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
GONE = "/old-catalogue"

pytestmark = [pytest.mark.needs("unshare"), pytest.mark.timeout(120), pytest.mark.alone]


@pytest.fixture(autouse=True)
def _may_unshare():
    """Skip the test where this user can't make a pid namespace."""
    done = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no pid namespaces here: {done.stderr.strip()}")


@pytest.fixture
def receiver():
    """A StatsD receiver."""
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


def requests(receiver: Receiver) -> float:
    """Return how many requests StatsD has received."""
    found = receiver.counts().items()
    return sum(n for name, n in found if name.startswith("http.server.request") and name.endswith(".count"))


def command_line(pid: int) -> bytes:
    """Return the command line of a process."""
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


def terminate(process: subprocess.Popen, seconds: float = 10.0) -> None:
    """Send SIGTERM to process 1 of the namespace, and wait until the namespace is gone."""
    (first,) = children(process.pid)
    os.kill(first, signal.SIGTERM)
    process.wait(seconds)


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_statsd_has_every_request_when_gunicorn_is_process_1(short_dir, receiver, worker_class):
    """If gunicorn is process 1 and is terminated, StatsD has received all 300 requests before it exits."""
    arguments = ["-w", "3", "-k", worker_class, "--log-level", "warning"]
    service = Service(short_dir, arguments, TAPES_STATSD=f"127.0.0.1:{receiver.port}")
    with running([*NAMESPACE, *service.command], cwd=short_dir, **service.environment) as process:
        service.wait_until_up()
        for _ in range(300):
            assert get(service.port, GONE)[0] == 410
        terminate(process)
    assert requests(receiver) == 300


def test_statsd_has_what_a_killed_worker_published_when_gunicorn_is_process_1(short_dir, receiver):
    """If gunicorn is process 1 and kills a hanging worker, StatsD receives what the worker had published."""
    arguments = ["-w", "2", "--graceful-timeout", "1", "--log-level", "warning"]
    service = Service(short_dir, arguments, TAPES_STATSD=f"127.0.0.1:{receiver.port}")
    with running([*NAMESPACE, *service.command], cwd=short_dir, **service.environment) as process:
        service.wait_until_up()
        for _ in range(50):
            assert get(service.port, GONE)[0] == 410
        wait_for(lambda: gone_requests(service.port) == 50, "all is published")
        (first,) = children(process.pid)
        worker = min(pid for pid in children(first) if b"tapes aggregator" not in command_line(pid))
        os.kill(worker, signal.SIGSTOP)
        terminate(process)
    assert requests(receiver) == 50


JOB = """
import sys, threading, tapes
done = tapes.counter("job.done")
pause = threading.Event()
for _ in range(100):
    done.increment()
    pause.wait(0.01)
"""


def test_statsd_has_all_of_a_short_job_that_is_process_1(short_dir, receiver):
    """A job under ``tapes run`` that is process 1 exits only after StatsD has received all its counts."""
    home = Home(short_dir)
    command = [os.path.join(os.path.dirname(sys.executable), "tapes"), "run", "--statsd",
               f"127.0.0.1:{receiver.port}", "--", sys.executable, "-c", JOB]  # fmt: skip
    for turn in (1, 2, 3):
        status, output, errors = home.run([*NAMESPACE, *command])
        assert (status, output) == (0, ""), errors
        assert receiver.counts()["job.done"] == 100 * turn
