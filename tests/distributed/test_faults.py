"""What a machine does to a service: full disks and tables, stopped processes, odd clocks, broken sockets.

In each: whatever the application calls succeeds, memory is bounded, and the totals are exact afterwards.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

from tests.crew import crew, resident, stopped
from tests.processes import free_port, get, wait_for

STOPPED_SECONDS = 30 if os.environ.get("TAPES_LONG") else 3
MEGABYTE = 2**20


@pytest.fixture
def service(short_dir):
    """A service without workers yet."""
    with crew(short_dir) as found:
        try:
            yield found
        finally:
            print(found.log.read_text(errors="replace")[-5000:])


def all_is_counted(reader, hands, seconds=5.0):
    """Wait until a read tells exactly what the workers were told to count; nothing went wrong in them."""
    told = [hand.ask("told") for hand in hands]
    assert [one["errors"] for one in told] == [[] for _ in told]
    expected = [sum(one["counted"] for one in told)] * 4
    found = []

    def exact():
        found[:] = [reader.ask("read").get("counts")]
        return found == [expected]

    try:
        wait_for(exact, "all is counted", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}: {found} of {expected}") from None


def ended_well(children, seconds=1.7):
    """Whether all children ended by themselves, with what they had to do done, in time."""
    assert {status for status, _ in children} == {0}, children
    assert max(taken for _, taken in children) < seconds, children
    return True


def slowest_call(*hands):
    """How long the slowest call of the application took since this was asked last."""
    return max(hand.ask("told")["slowest"] for hand in hands)


# Full disks, and directories that can't be written to: in a mount namespace of the service's own, so that
# nothing is mounted when it has ended.


class Mounted:
    """A service that meets on a file system of its own, of a quarter of a megabyte."""

    def __init__(self, short_dir, options=""):
        self.place = short_dir / "fs"
        self.place.mkdir()
        self.options = f"size=256k,mode=700{options}"
        self.inside = []
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount: run as root")

    def first(self, service):
        script = f'mount -t tmpfs -o {self.options} tmpfs "$0" && exec "$@"'
        hand = service.hire(["unshare", "-m", "sh", "-c", script, str(self.place)])
        self.inside = ["nsenter", f"--mount=/proc/{hand.pid}/ns/mnt", "--"]
        service.seen = self.seen = pathlib.Path(f"/proc/{hand.pid}/root{self.place}")
        return hand

    def more(self, service):
        return service.hire(self.inside)

    def sh(self, script):
        subprocess.run([*self.inside, "sh", "-ec", script, str(self.place)], check=True)

    @contextlib.contextmanager
    def filled(self):
        """Somebody writes to it whenever there is room for a byte."""
        stop, full = threading.Event(), threading.Event()

        def write():
            with (self.seen / "filler").open("wb", buffering=0) as file:
                while not stop.is_set():
                    try:
                        file.write(b"x" * 4096)
                    except OSError:
                        full.set()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert full.wait(5)
            yield
        finally:
            stop.set()
            writer.join()
            (self.seen / "filler").unlink()

    @contextlib.contextmanager
    def out_of_inodes(self):
        """Nobody can make a file."""
        made = []
        try:
            with contextlib.suppress(OSError):
                for number in range(100):
                    (self.seen / f"filler{number}").touch()
                    made.append(number)
            assert len(made) < 100
            yield
        finally:
            for number in made:
                (self.seen / f"filler{number}").unlink()

    @contextlib.contextmanager
    def read_only(self, name=""):
        """It, or a file in it, can only be read."""
        self.sh(f'mount --bind "$0/{name}" "$0/{name}"; mount -o remount,bind,ro "$0/{name}"')
        try:
            yield
        finally:
            self.sh(f'umount "$0/{name}"')


@contextlib.contextmanager
def two_workers(short_dir, options=""):
    """A service on a file system of its own, and two workers, who end well."""
    mounted = Mounted(short_dir, options)
    with crew(short_dir, mounted.place) as service:
        one = mounted.first(service)
        two = mounted.more(service)
        yield mounted, service, one, two
        one.end()
        two.end()


FEW_INODES = {"out_of_inodes": ",nr_inodes=14"}


def journal_failed(reader):
    return reader.ask("read")["tapes"].get("journal", {}).get("failed", {}).get("value", 0)


@pytest.mark.needs("unshare", "nsenter")
@pytest.mark.parametrize("how", ["filled", "out_of_inodes", "read_only"])
def test_a_disk_that_cannot_be_written_to(short_dir, how):
    """Children come and go meanwhile; then there is room, and the aggregator is killed."""
    with two_workers(short_dir, FEW_INODES.get(how, "")) as (mounted, service, one, two):
        one.ask("load")
        ended_well(one.ask("children", 4, 10, 2))
        memory = one.memory, resident(service.aggregator)
        with getattr(mounted, how)():
            ended_well(one.ask("children", 10, 10, 2))
            wait_for(lambda: journal_failed(two) > 0, "the journal can't be written")
            mounted.more(service).end()
        failed = journal_failed(two)
        wait_for(lambda: "m.ipc.journal.draft" not in os.listdir(mounted.seen), "the journal is whole")
        one.ask("halt")
        all_is_counted(two, [one, two])
        written = os.stat(mounted.seen / "m.ipc.journal").st_mtime_ns
        two.ask("count", 1)
        wait_for(lambda: os.stat(mounted.seen / "m.ipc.journal").st_mtime_ns > written, "it is written again")
        killed = service.kill_aggregator()
        all_is_counted(two, [one, two])
        assert service.aggregator != killed
        assert journal_failed(two) == failed
        assert service.said("can't write its journal") == 1
        assert one.memory < memory[0] + 8 * MEGABYTE
        assert resident(service.aggregator) < memory[1] + 8 * MEGABYTE


@pytest.mark.needs("unshare", "nsenter")
@pytest.mark.parametrize("how", ["filled", "out_of_inodes", "read_only"])
def test_an_aggregator_that_dies_while_the_disk_cannot_be_written_to(short_dir, how):
    """Another one comes as soon as there is room at the latest; all that lives is exact."""
    with two_workers(short_dir, FEW_INODES.get(how, "")) as (mounted, service, one, two):
        one.ask("load")
        with getattr(mounted, how)():
            service.kill_aggregator()
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                two.ask("read")
        wait_for(lambda: two.ask("read").get("counts"), "there is an aggregator again", 8)
        ended_well(one.ask("children", 4, 10, 2))
        one.ask("halt")
        all_is_counted(two, [one, two])


@pytest.mark.needs("unshare", "nsenter")
def test_a_journal_that_cannot_be_replaced(short_dir):
    """It is a mount point: the draft is written, the rename fails; later it is replaced."""
    with two_workers(short_dir) as (mounted, service, one, two):
        ended_well(one.ask("children", 4, 10, 2))
        wait_for((mounted.seen / "m.ipc.journal").exists, "there is a journal")
        with mounted.read_only("m.ipc.journal"):
            ended_well(one.ask("children", 10, 10, 2))
            wait_for(lambda: journal_failed(two) > 1, "the journal can't be replaced")
            ended_well(one.ask("children", 4, 10, 2))
            assert "m.ipc.journal.draft" not in os.listdir(mounted.seen)
            killed = service.kill_aggregator()
            all_is_counted(two, [one, two])
            assert service.aggregator != killed
        all_is_counted(two, [one, two])


def test_an_aggregator_that_cannot_be_started_for_a_while(service):
    """The one before died, and somebody has its port: another one comes when that is free again."""
    port = free_port()
    one = service.hire(TAPES_HTTP=str(port))
    two = service.hire(TAPES_HTTP=str(port))
    ended_well(one.ask("children", 4, 10, 2))
    all_is_counted(two, [one, two])
    service.kill_aggregator()
    taken = wait_for(lambda: socket.create_server(("127.0.0.1", port)), "the port is taken", every=0.001)
    with taken:
        wait_for(lambda: service.said("can't start its aggregator again"), "it can't be started")
    ended_well(one.ask("children", 4, 10, 4))
    wait_for(lambda: two.ask("read").get("counts"), "there is an aggregator again", 10)
    all_is_counted(two, [one, two])
    wait_for(lambda: get(port, "/metrics")[0] == 200, "it has its reporter", 5)
    one.end()
    two.end()


def test_a_directory_that_is_removed(short_dir):
    """Somebody tidies up below a running service; nobody in it notices, and it goes on counting."""
    meets = short_dir / "tapes"
    meets.mkdir()
    with crew(short_dir, meets) as service:
        one, two = service.hire(), service.hire()
        one.ask("load")
        ended_well(one.ask("children", 4, 10, 2))
        all_is_read = two.ask("read")["counts"][0]
        shutil.rmtree(meets)
        meets.mkdir()
        ended_well(one.ask("children", 4, 10, 4))
        one.ask("halt")
        all_is_counted(two, [one, two])
        assert all_is_read > 0
        assert service.hire().ask("read")["counts"] == two.ask("read")["counts"]


# Full tables of descriptors.


def test_no_descriptors_in_a_worker(service):
    """It counts on, forks and reads meanwhile; it does not die, and loses nothing."""
    one, two = service.hire(), service.hire()
    ended_well(one.ask("children", 2, 10))
    memory = one.memory
    one.ask("fill", 200)
    one.ask("load")
    for _ in range(3):
        ended_well(one.ask("children", 2, 10, 2))
        assert one.ask("read")["seconds"] < 1.2
    one.ask("empty")
    one.ask("halt")
    all_is_counted(two, [one, two])
    ended_well(one.ask("children", 2, 10))
    all_is_counted(one, [one, two])
    assert one.memory < memory + 8 * MEGABYTE
    one.end()
    two.end()


def test_any_number_of_descriptors_but_enough(service):
    """1 to 24 are left when a process forks, and in its child: neither dies, and the last words need one."""
    one, two = service.hire(), service.hire()
    for left in range(1, 25):
        one.ask("fill", 200, left)
        ended_well(one.ask("children", 1, 10, 1, left), 3)
        one.ask("empty")
    all_is_counted(two, [one, two])
    one.end()
    two.end()


def descriptors(pid):
    return [int(entry) for entry in os.listdir(f"/proc/{pid}/fd")]


def test_no_descriptors_in_the_aggregator(service):
    """Workers come meanwhile. 0MQ may end it for that; nothing is lost, and no worker minds."""
    one, two = service.hire(), service.hire()
    one.ask("load")
    aggregator = service.aggregator
    before = resource.prlimit(aggregator, resource.RLIMIT_NOFILE)
    resource.prlimit(aggregator, resource.RLIMIT_NOFILE, (max(descriptors(aggregator)) + 1, before[1]))
    try:
        new = [service.hire() for _ in range(3)]
        for hand in new:
            hand.ask("count", 10)
        ended_well(one.ask("children", 4, 10, 4))
        for hand in (one, two, *new):
            assert hand.ask("read")["seconds"] < 1.2
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(aggregator, resource.RLIMIT_NOFILE, before)
    one.ask("halt")
    all_is_counted(two, [one, two, *new])
    for hand in service.hands:
        hand.end()


# Processes that are stopped.


def test_a_stopped_aggregator(service):
    """Reads say so in time, nobody else is held up, children end; then all is counted."""
    one, two = service.hire(), service.hire()
    one.ask("load", 0.001, 100)
    ended_well(one.ask("children", 4, 10, 4))
    aggregator = service.aggregator
    memory = one.memory, resident(aggregator)
    before = slowest_call(one)
    reads, ended = [], []
    with stopped(aggregator):
        until = time.monotonic() + STOPPED_SECONDS
        while time.monotonic() < until:
            one.send("children", 4, 10, 4)
            reads.append(two.ask("read"))
            ended += one.receive()
        new = service.hire()
        new.ask("count", 10)
        assert new.end() < 3
        meanwhile = slowest_call(one)
        grown = one.memory - memory[0]
    print(f"children: {len(ended)}, {max(taken for _, taken in ended):.2f} s at most")
    print(f"slowest call {before:.4f} before, {meanwhile:.4f} s meanwhile; grown by {grown}")
    print("reads:", max(read["seconds"] for read in reads), len(reads))
    ended_well(ended)
    assert all("unavailable" in read and read["seconds"] < 1.2 for read in reads), reads
    assert meanwhile < before + 0.25
    assert grown < 4 * MEGABYTE
    two.ask("count", 10)  # in place of what the one that ended had counted
    one.ask("halt")
    told = [hand.ask("told")["counted"] for hand in (one, two)]
    wait_for(lambda: two.ask("read").get("counts") == [sum(told) + 10] * 4, "all is counted", 5)
    assert service.aggregator == aggregator
    assert resident(aggregator) < memory[1] + 10 * MEGABYTE
    one.end()
    two.end()


def test_a_stopped_worker(service):
    """Others are not held up, not by the end of the aggregator either; it goes on where it was."""
    one, two, three = (service.hire() for _ in range(3))
    one.ask("load")
    with stopped(one.pid):
        for _ in range(5):
            three.ask("count", 10)
            read = two.ask("read")
            assert read["counts"]
            assert read["seconds"] < 0.5
        ended_well(three.ask("children", 4, 10, 4))
    one.ask("halt")
    all_is_counted(two, [one, two, three])
    one.ask("load")
    with stopped(one.pid):
        three.ask("count", 10)
        known = two.ask("read")["counts"]
        since = time.time()
        journal = service.seen / "m.ipc.journal"
        three.ask("count", 10)
        wait_for(lambda: journal.stat().st_mtime > since, "what is known is in the journal")
        killed = service.kill_aggregator()
        started = time.monotonic()
        again = wait_for(lambda: two.ask("read").get("counts"), "reads are answered again", 5)
        print(f"answered again after {time.monotonic() - started:.2f} s")
        assert again >= known  # nothing that was in the journal is missing
        ended_well(three.ask("children", 4, 10, 4))
    assert service.aggregator != killed
    one.ask("halt")
    all_is_counted(two, [one, two, three])
    for hand in service.hands:
        hand.end()


# Clocks.


def sane(rates):
    return all(math.isfinite(rate) and 0 <= rate < 1e5 for rate in rates)


def test_a_wall_clock_that_jumps(service):
    """By hours, forward and back, as Python tells it: it is no part of any number."""
    steady, jumper = service.hire(), service.hire()
    jumper.ask("load")
    for hours in (7, -9, 0):
        assert abs(jumper.ask("jump", hours) - time.time() - 3600 * hours) < 60
        ended_well(jumper.ask("children", 2, 10, 2))
        jumper.ask("halt")
        steady.ask("count", 10)
        all_is_counted(steady, [jumper, steady])
        for hand in (jumper, steady):
            assert sane(hand.ask("read")["rates"])
        jumper.ask("load")
    jumper.ask("halt")
    jumper.end()
    steady.end()


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("offset", [40_000, -1])
def test_a_monotonic_clock_of_its_own(service, offset):
    """In a container with a time namespace: counts are exact, rates are finite."""
    if offset < 0:
        offset = -int(time.monotonic() / 2)
    other = ["unshare", "-T", "--monotonic", str(offset), "--"]
    if subprocess.run([*other, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs time namespaces: run as root")
    steady = service.hire()
    odd = service.hire([*other, "sh", "-c", '"$@"', "sh"])
    for _ in range(3):
        odd.ask("load")
        ended_well(odd.ask("children", 2, 10, 2))
        odd.ask("halt")
        steady.ask("count", 10)
        all_is_counted(steady, [odd, steady])
        for hand in (odd, steady):
            assert sane(hand.ask("read")["rates"])
    service.kill_aggregator()
    all_is_counted(steady, [odd, steady])
    odd.end()
    steady.end()


# Sockets that fail.


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
def test_sends_that_fail(service, error):
    """In a worker's 0MQ thread, for a while: it connects again and says everything."""
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to trace")
    one, two = service.hire(), service.hire()
    one.ask("count", 10)
    all_is_counted(two, [one, two])
    memory = one.memory
    log = service.directory / "strace.log"
    command = [
        "strace", "-o", str(log), "-e", "trace=sendto", "-e", f"inject=sendto:error={error}:when=1+2",
        "-p", str(io_thread(one.pid)),
    ]  # fmt: skip
    with log.open("w"), subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
        try:
            one.ask("load")
            wait_for(lambda: log.read_text().count("INJECTED"), "a send has failed")
            read = two.ask("read")
            assert read["counts"]
            assert read["seconds"] < 0.5
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(5)
    one.ask("halt")
    all_is_counted(two, [one, two])
    ended_well(one.ask("children", 2, 10, 2))
    all_is_counted(one, [one, two])
    assert one.memory < memory + 8 * MEGABYTE
    one.end()
    two.end()
