"""Faults of the machine: stopped processes, no free descriptors, jumping clocks, failing sends, a used port.

In each test all calls of the application succeed, memory is bounded, and totals are exact in the end.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import resource
import signal
import socket
import subprocess
import time

import pytest

from tests.crew import assert_all_counted, assert_children_succeeded, crew, resident, stopped
from tests.processes import free_port, get, wait_for

pytestmark = pytest.mark.alone  # they measure how long children take to exit and reads to be answered

STOPPED_SECONDS = 30 if os.environ.get("TAPES_LONG") else 3
MEGABYTE = 2**20


@pytest.fixture
def service(short_dir):
    """A service without workers yet; its log is shown in a failure report."""
    with crew(short_dir) as found:
        try:
            yield found
        finally:
            print(found.log.read_text(errors="replace")[-5000:])


def test_an_aggregator_whose_port_is_taken_is_restarted_when_the_port_is_free(service):
    """Workers restart a dead aggregator when its port, which another program took, is free again."""
    port = free_port()
    one = service.start_worker(TAPES_HTTP=str(port))
    two = service.start_worker(TAPES_HTTP=str(port))
    assert_children_succeeded(one.call("fork_children", 4, 10, 2))
    assert_all_counted(two, [one, two])
    service.kill_aggregator()
    taken = wait_for(lambda: socket.create_server(("127.0.0.1", port)), "the port can be taken", every=0.001)
    with taken:
        wait_for(lambda: service.log_lines("can't start its aggregator again"), "a start has failed")
    assert_children_succeeded(one.call("fork_children", 4, 10, 4))
    wait_for(lambda: two.call("read").get("counts"), "an aggregator answers again", 10)
    assert_all_counted(two, [one, two])
    wait_for(lambda: get(port, "/metrics")[0] == 200, "its HTTP reporter answers", 5)
    one.exit()
    two.exit()


def slowest_call(worker):
    """Return the seconds of the worker's slowest recording call since the last report."""
    return worker.call("report")["slowest"]


# No free descriptors.


def test_a_worker_without_free_descriptors_loses_nothing(service):
    """A worker without a free descriptor goes on counting, forking and reading, and loses nothing."""
    one, two = service.start_worker(), service.start_worker()
    assert_children_succeeded(one.call("fork_children", 2, 10))
    memory = one.memory
    one.call("exhaust_descriptors", 200)
    one.call("start_load")
    for _ in range(3):
        assert_children_succeeded(one.call("fork_children", 2, 10, 2))
        assert one.call("read")["seconds"] < 1.2
    one.call("release_descriptors")
    one.call("stop_load")
    assert_all_counted(two, [one, two])
    assert_children_succeeded(one.call("fork_children", 2, 10))
    assert_all_counted(one, [one, two])
    assert one.memory < memory + 8 * MEGABYTE
    one.exit()
    two.exit()


def test_a_fork_with_few_free_descriptors_loses_nothing(service):
    """A process that forks with 1 to 24 free descriptors, in itself and in its child, loses no count."""
    one, two = service.start_worker(), service.start_worker()
    for left in range(1, 25):
        one.call("exhaust_descriptors", 200, left)
        assert_children_succeeded(one.call("fork_children", 1, 10, 1, left), 3)
        one.call("release_descriptors")
    assert_all_counted(two, [one, two])
    one.exit()
    two.exit()


def descriptors(pid):
    """Return the file descriptors of a process."""
    return [int(entry) for entry in os.listdir(f"/proc/{pid}/fd")]


def test_an_aggregator_without_free_descriptors_loses_nothing(service):
    """While the aggregator has no free descriptor, new workers join, none is held up, and no count is lost.

    0MQ may abort the aggregator for that; workers then start another one.
    """
    one, two = service.start_worker(), service.start_worker()
    one.call("start_load")
    aggregator = service.aggregator
    before = resource.prlimit(aggregator, resource.RLIMIT_NOFILE)
    resource.prlimit(aggregator, resource.RLIMIT_NOFILE, (max(descriptors(aggregator)) + 1, before[1]))
    try:
        new = [service.start_worker() for _ in range(3)]
        for worker in new:
            worker.call("count", 10)
        assert_children_succeeded(one.call("fork_children", 4, 10, 4))
        for worker in (one, two, *new):
            assert worker.call("read")["seconds"] < 1.2
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(aggregator, resource.RLIMIT_NOFILE, before)
    one.call("stop_load")
    assert_all_counted(two, [one, two, *new])
    for worker in service.workers:
        worker.exit()


# Processes that are stopped.


def test_a_stopped_aggregator_holds_up_reads_only(service):
    """While the aggregator is stopped, reads fail within 1.2 s, children exit, and no recording call waits.

    When it continues, everything is counted.
    """
    one, two = service.start_worker(), service.start_worker()
    one.call("start_load", 0.001, 100)
    assert_children_succeeded(one.call("fork_children", 4, 10, 4))
    aggregator = service.aggregator
    memory = one.memory, resident(aggregator)
    before = slowest_call(one)
    reads, exits = [], []
    with stopped(aggregator):
        until = time.monotonic() + STOPPED_SECONDS
        while time.monotonic() < until:
            one.send("fork_children", 4, 10, 4)
            reads.append(two.call("read"))
            exits += one.receive()
        new = service.start_worker()
        new.call("count", 10)
        assert new.exit() < 3
        meanwhile = slowest_call(one)
        grown = one.memory - memory[0]
    print(f"children: {len(exits)}, {max(taken for _, taken in exits):.2f} s at most")
    print(f"slowest call {before:.4f} before, {meanwhile:.4f} s meanwhile; grown by {grown}")
    print("reads:", max(read["seconds"] for read in reads), len(reads))
    assert_children_succeeded(exits)
    assert all("unavailable" in read and read["seconds"] < 1.2 for read in reads), reads
    assert meanwhile < before + 0.25
    assert grown < 4 * MEGABYTE
    two.call("count", 10)
    one.call("stop_load")
    expected = sum(worker.call("report")["counted"] for worker in (one, two)) + 10  # of `new`
    wait_for(lambda: two.call("read").get("counts") == [expected] * 4, "all events are counted", 5)
    assert service.aggregator == aggregator
    assert resident(aggregator) < memory[1] + 10 * MEGABYTE
    one.exit()
    two.exit()


def test_a_stopped_worker_holds_up_no_other_worker(service):
    """A stopped worker delays neither other workers nor a killed aggregator's restart, and loses nothing."""
    one, two, three = (service.start_worker() for _ in range(3))
    one.call("start_load")
    with stopped(one.pid):
        for _ in range(5):
            three.call("count", 10)
            read = two.call("read")
            assert read["counts"]
            assert read["seconds"] < 0.5
        assert_children_succeeded(three.call("fork_children", 4, 10, 4))
    one.call("stop_load")
    assert_all_counted(two, [one, two, three])
    one.call("start_load")
    with stopped(one.pid):
        three.call("count", 10)
        before = two.call("read")["counts"]
        since = time.time()
        journal = service.visible_directory / "m.ipc.journal"
        three.call("count", 10)
        wait_for(lambda: journal.stat().st_mtime > since, "the journal has all counts")
        killed = service.kill_aggregator()
        started = time.monotonic()
        again = wait_for(lambda: two.call("read").get("counts"), "reads are answered again", 5)
        print(f"answered again after {time.monotonic() - started:.2f} s")
        assert again >= before  # nothing that the journal had is missing
        assert_children_succeeded(three.call("fork_children", 4, 10, 4))
    assert service.aggregator != killed
    one.call("stop_load")
    assert_all_counted(two, [one, two, three])
    for worker in service.workers:
        worker.exit()


# Clocks.


def all_finite(rates):
    """Return whether all rates are finite and plausible."""
    return all(math.isfinite(rate) and 0 <= rate < 1e5 for rate in rates)


def test_jumps_of_the_wall_clock_change_no_number(service):
    """A wall clock that jumps by hours, forward and back, changes no count and no rate."""
    steady, jumper = service.start_worker(), service.start_worker()
    jumper.call("start_load")
    for hours in (7, -9, 0):
        assert abs(jumper.call("shift_wall_clock", hours) - time.time() - 3600 * hours) < 60
        assert_children_succeeded(jumper.call("fork_children", 2, 10, 2))
        jumper.call("stop_load")
        steady.call("count", 10)
        assert_all_counted(steady, [jumper, steady])
        for worker in (jumper, steady):
            assert all_finite(worker.call("read")["rates"])
        jumper.call("start_load")
    jumper.call("stop_load")
    jumper.exit()
    steady.exit()


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("offset", [40_000, -1])
def test_a_worker_with_another_monotonic_clock_counts_exactly(service, offset):
    """A worker in a time namespace, whose monotonic clock differs, has exact counts and finite rates."""
    if offset < 0:
        offset = -int(time.monotonic() / 2)
    other = ["unshare", "-T", "--monotonic", str(offset), "--"]
    if subprocess.run([*other, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs time namespaces: run as root")
    steady = service.start_worker()
    odd = service.start_worker([*other, "sh", "-c", '"$@"', "sh"])
    for _ in range(3):
        odd.call("start_load")
        assert_children_succeeded(odd.call("fork_children", 2, 10, 2))
        odd.call("stop_load")
        steady.call("count", 10)
        assert_all_counted(steady, [odd, steady])
        for worker in (odd, steady):
            assert all_finite(worker.call("read")["rates"])
    service.kill_aggregator()
    assert_all_counted(steady, [odd, steady])
    odd.exit()
    steady.exit()


# Failing sends.


def io_thread(pid):
    """Return the thread in which 0MQ does a worker's input and output."""
    names = {
        int(task.name): (task / "comm").read_text().strip()
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir()
    }
    (found,) = [task for task, name in names.items() if name.startswith("ZMQbg/IO")]
    return found


@pytest.mark.needs("strace")
@pytest.mark.parametrize("error", ["ECONNREFUSED", "ENOBUFS", "EPIPE"])
def test_sends_that_fail_lose_nothing(service, error):
    """When the system calls of a worker's 0MQ thread fail for a while, it reconnects and loses no count."""
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to trace")
    one, two = service.start_worker(), service.start_worker()
    one.call("count", 10)
    assert_all_counted(two, [one, two])
    memory = one.memory
    log = service.directory / "strace.log"
    command = [
        "strace", "-o", str(log), "-e", "trace=sendto", "-e", f"inject=sendto:error={error}:when=1+2",
        "-p", str(io_thread(one.pid)),
    ]  # fmt: skip
    with log.open("w"), subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
        try:
            one.call("start_load")
            wait_for(lambda: log.read_text().count("INJECTED"), "a send has failed")
            read = two.call("read")
            assert read["counts"]
            assert read["seconds"] < 0.5
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(5)
    one.call("stop_load")
    assert_all_counted(two, [one, two])
    assert_children_succeeded(one.call("fork_children", 2, 10, 2))
    assert_all_counted(one, [one, two])
    assert one.memory < memory + 8 * MEGABYTE
    one.exit()
    two.exit()
