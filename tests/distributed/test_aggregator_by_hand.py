"""An aggregator that the application starts with `RegistryAggregator`: its start, its reporter, its end."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys

import pytest

import tapes
from tapes.distributed.registry import RegistryAggregator
from tapes.errors import InvalidArgument
from tests.distributed.conftest import AGGREGATOR
from tests.processes import connected, free_port, get, mentions, run_python, running, wait_for

SERVICE = """
import os, signal, sys, time
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.reporting.http import HTTPReporter

registry = DistributedRegistry("ipc://m.ipc")
counter, timer = registry.counter("c"), registry.timer("my.timer")
aggregator = RegistryAggregator(HTTPReporter(int(sys.argv[1])), "ipc://m.ipc")
aggregator.start()
pids = []
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        registry.connect()
        for _ in range(1000):
            counter.increment()
            with timer.time():
                pass
        registry.gauge("g", merge="each").set(number)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.pause()
    pids.append(pid)

def end(*_):
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    for pid in pids:
        os.waitpid(pid, 0)
    aggregator.stop()
    os._exit(0)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
while True:
    signal.pause()
"""


@pytest.fixture
def service(short_dir):
    """A service of four workers that have counted 1,000 each, and the port of its HTTPReporter."""
    port = free_port()
    with running([sys.executable, "-W", "error", "-c", SERVICE, str(port), "4"], cwd=short_dir) as process:
        yield process, port, short_dir


def stats(port):
    """Return the tree that the HTTPReporter shows."""
    return json.loads(get(port, "/metrics")[2])


def test_an_http_reporter_shows_the_merged_values_of_all_workers(service):
    """An HTTPReporter in the aggregator shows the sum of four workers, in every format that it has."""
    _, port, _ = service

    def complete():
        found = stats(port)
        timed = found.get("my", {}).get("timer", {}).get("count")
        all_in = found.get("c", {}).get("value") == timed == 4000 and len(found.get("g", {})) == 4
        return found if all_in else None

    gauges = wait_for(complete, "all is merged")["g"]
    assert sorted(one["value"] for one in gauges.values()) == [0, 1, 2, 3]
    assert get(port, "/")[2].startswith(b"{")
    assert get(port, "/nothing")[0] == 404
    assert get(port, "/metrics", "HEAD")[0] == 200
    assert b"my_timer_seconds_count 4000" in get(port, "/metrics", Accept="text/plain")[2]
    assert get(port, "/metrics?format=yaml")[0] == 400


def test_only_the_user_can_access_the_sockets_and_the_lock(service):
    """The sockets and the lock file of an aggregator are accessible only for its user."""
    _, port, short_dir = service
    wait_for(lambda: stats(port), "the service is up")
    for name in ("m.ipc", "m.ipc.read", "m.ipc.lock"):
        assert stat.S_IMODE((short_dir / name).stat().st_mode) & 0o077 == 0


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_within_four_seconds(service, number):
    """When the parent exits or is killed, its aggregator exits within 4 s and removes its files."""
    process, port, short_dir = service
    wait_for(lambda: stats(port).get("c", {}).get("value") == 4000, "all is merged")
    workers = [pid for pid in mentions(str(short_dir)) if pid != process.pid]
    process.send_signal(number)
    process.wait(5)
    if number == signal.SIGKILL:  # the workers have no parent that ends them
        watched = [pid for pid in workers if b"signal.pause" in _cmdline(pid)]
        wait_for(lambda: list(short_dir.iterdir()) == [short_dir / "output.log"], "no file is left", 4)
        for pid in watched:
            if pid in mentions(str(short_dir)):
                os.kill(pid, signal.SIGKILL)
    wait_for(lambda: mentions(str(short_dir)) == [], "no process is left", 4)
    wait_for(lambda: list(short_dir.iterdir()) == [short_dir / "output.log"], "no file is left", 4)
    assert (short_dir / "output.log").read_text() == ""


def _cmdline(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def test_stop_in_a_forked_child_does_nothing(short_dir):
    """A forked child that calls stop() does not stop the aggregator of its parent."""
    done = run_python(
        """
import os
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
aggregator = RegistryAggregator([], "ipc://m.ipc")
aggregator.start()
if os.fork() == 0:
    aggregator.stop()
    os._exit(0)
os.wait()
registry = DistributedRegistry("ipc://m.ipc")
registry.counter("c").increment()
registry.connect()
assert registry.get_stats().c.value == 1
registry.close()
aggregator.stop()
""",
        cwd=short_dir,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(short_dir.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_aggregator_in_the_foreground_exits_cleanly(short_dir, number):
    """At SIGINT or SIGTERM an aggregator in the foreground exits with 0, prints nothing, leaves no file."""
    with running(AGGREGATOR, cwd=short_dir) as process:
        with connected(f"ipc://{short_dir}/m.ipc") as reader:
            wait_for(reader.get_stats, "the aggregator answers")
        process.send_signal(number)
        assert process.wait(4) == 0
    assert [path.name for path in short_dir.iterdir()] == ["output.log"]
    assert (short_dir / "output.log").read_text() == ""


CANNOT_BIND = {
    "another aggregator": ("first.start(); second.start({fork})", "another aggregator (pid "),
    "not a socket": ("open('m.ipc', 'w').close(); first.start({fork})", "not a socket"),
    "no directory": ("RegistryAggregator([], 'ipc://nowhere/m.ipc').start({fork})", "existing directory"),
    "path too long": ("RegistryAggregator([], 'ipc://' + 'x' * 200)", "at most 107"),
    "port in use": ("RegistryAggregator(HTTPReporter(port), 'ipc://n.ipc').start({fork})", "another port"),
    "started twice": ("first.start(); first.start({fork})", "called twice"),
}


@pytest.mark.parametrize("case", CANNOT_BIND)
@pytest.mark.parametrize("fork", ["fork=True", "fork=False"])
def test_an_aggregator_that_cannot_start_raises_one_sentence(short_dir, case, fork):
    """An aggregator that can't start raises one sentence (what is wrong, what to do) and leaves no file."""
    code, expected = CANNOT_BIND[case]
    program = f"""
import socket, sys
from tapes import TapesError
from tapes.distributed.registry import RegistryAggregator
from tapes.reporting.http import HTTPReporter
first, second = RegistryAggregator([], "ipc://m.ipc"), RegistryAggregator([], "ipc://m.ipc")
with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    try:
        {code.format(fork=fork)}
    except TapesError as error:
        sys.exit(f"tapes: {{error}}")
    finally:
        first.stop()
        second.stop()
"""
    done = run_python(program, cwd=short_dir)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert expected in done.stderr
    left = [path.name for path in short_dir.iterdir()]
    assert left == (["m.ipc"] if case == "not a socket" else [])
    assert mentions(str(short_dir)) == []


def test_an_argument_that_is_no_reporter_is_refused():
    """RegistryAggregator refuses a registry, a class or another object in place of a reporter."""
    for wrong in ([object()], 5, RegistryAggregator, tapes.default_registry):
        with pytest.raises(InvalidArgument, match="Reporter"):
            RegistryAggregator(wrong)
