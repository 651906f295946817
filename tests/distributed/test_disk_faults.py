"""Disks that can't be written to: full, without inodes, read-only, or with the service's directory removed.

In each test all calls of the application succeed, memory is bounded, and totals are exact in the end.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import threading
import time

import pytest

from tests.crew import assert_all_counted, assert_children_succeeded, crew, resident
from tests.processes import wait_for

pytestmark = pytest.mark.alone  # they measure how long children take to exit

MEGABYTE = 2**20


class SmallFileSystem:
    """A file system of 256 KiB, mounted over the service's directory in a mount namespace of its first
    worker.

    The namespace ends with the service's processes, so nothing stays mounted.
    """

    def __init__(self, short_dir, options=""):
        self.mount_point = short_dir / "fs"
        self.mount_point.mkdir()
        self.options = f"size=256k,mode=700{options}"
        self._enter = []
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount: run as root")

    def start_first_worker(self, service):
        """Start the worker that mounts the file system, in a new mount namespace."""
        script = f'mount -t tmpfs -o {self.options} tmpfs "$0" && exec "$@"'
        worker = service.start_worker(["unshare", "-m", "sh", "-c", script, str(self.mount_point)])
        self._enter = ["nsenter", f"--mount=/proc/{worker.pid}/ns/mnt", "--"]
        service.visible_directory = self.visible_path = pathlib.Path(
            f"/proc/{worker.pid}/root{self.mount_point}"
        )
        return worker

    def start_worker(self, service):
        """Start another worker in that mount namespace."""
        return service.start_worker(self._enter)

    def run_shell(self, script):
        """Run a shell script in that mount namespace; ``$0`` is the mount point."""
        subprocess.run([*self._enter, "sh", "-ec", script, str(self.mount_point)], check=True)

    @contextlib.contextmanager
    def filled(self):
        """Keep the file system full: a thread writes whenever a byte is free."""
        stop, full = threading.Event(), threading.Event()

        def write():
            with (self.visible_path / "filler").open("wb", buffering=0) as file:
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
            (self.visible_path / "filler").unlink()

    @contextlib.contextmanager
    def out_of_inodes(self):
        """Use all inodes, so that no file can be created."""
        made = []
        try:
            with contextlib.suppress(OSError):
                for number in range(100):
                    (self.visible_path / f"filler{number}").touch()
                    made.append(number)
            assert len(made) < 100
            yield
        finally:
            for number in made:
                (self.visible_path / f"filler{number}").unlink()

    @contextlib.contextmanager
    def read_only(self, name=""):
        """Make the file system, or one file in it, read-only."""
        self.run_shell(f'mount --bind "$0/{name}" "$0/{name}"; mount -o remount,bind,ro "$0/{name}"')
        try:
            yield
        finally:
            self.run_shell(f'umount "$0/{name}"')


@contextlib.contextmanager
def two_workers(short_dir, options=""):
    """Start a service on a small file system, with two workers that exit normally in the end."""
    mounted = SmallFileSystem(short_dir, options)
    with crew(short_dir, mounted.mount_point) as service:
        one = mounted.start_first_worker(service)
        two = mounted.start_worker(service)
        yield mounted, service, one, two
        one.exit()
        two.exit()


FEW_INODES = {"out_of_inodes": ",nr_inodes=14"}


def journal_failures(reader):
    """Return how often the aggregator failed to write its journal."""
    return reader.call("read")["tapes"].get("journal", {}).get("failed", {}).get("value", 0)


@pytest.mark.needs("unshare", "nsenter")
@pytest.mark.parametrize("how", ["filled", "out_of_inodes", "read_only"])
def test_counts_survive_a_disk_that_cannot_be_written(short_dir, how):
    """Children that exit while the disk can't be written are counted, and a later kill loses nothing.

    Once the disk has room again, the aggregator writes its journal, so its successor has the exact totals.
    """
    with two_workers(short_dir, FEW_INODES.get(how, "")) as (mounted, service, one, two):
        one.call("start_load")
        assert_children_succeeded(one.call("fork_children", 4, 10, 2))
        memory = one.memory, resident(service.aggregator)
        with getattr(mounted, how)():
            assert_children_succeeded(one.call("fork_children", 10, 10, 2))
            wait_for(lambda: journal_failures(two) > 0, "the journal can't be written")
            mounted.start_worker(service).exit()
        failed = journal_failures(two)
        wait_for(
            lambda: "m.ipc.journal.draft" not in os.listdir(mounted.visible_path), "the journal is complete"
        )
        one.call("stop_load")
        assert_all_counted(two, [one, two])
        journal = mounted.visible_path / "m.ipc.journal"
        written = journal.stat().st_mtime_ns
        two.call("count", 1)
        wait_for(lambda: journal.stat().st_mtime_ns > written, "the journal is written again")
        killed = service.kill_aggregator()
        assert_all_counted(two, [one, two])
        assert service.aggregator != killed
        assert journal_failures(two) == failed
        assert service.log_lines("can't write its journal") == 1
        assert one.memory < memory[0] + 8 * MEGABYTE
        assert resident(service.aggregator) < memory[1] + 8 * MEGABYTE


@pytest.mark.needs("unshare", "nsenter")
@pytest.mark.parametrize("how", ["filled", "out_of_inodes", "read_only"])
def test_an_aggregator_killed_while_the_disk_cannot_be_written_is_replaced(short_dir, how):
    """An aggregator killed on a full disk is replaced once there is room; live workers' counts are exact."""
    with two_workers(short_dir, FEW_INODES.get(how, "")) as (mounted, service, one, two):
        one.call("start_load")
        with getattr(mounted, how)():
            service.kill_aggregator()
            until = time.monotonic() + 1.5  # reads fail meanwhile, and workers try to start an aggregator
            while time.monotonic() < until:
                two.call("read")
        wait_for(lambda: two.call("read").get("counts"), "an aggregator answers again", 8)
        assert_children_succeeded(one.call("fork_children", 4, 10, 2))
        one.call("stop_load")
        assert_all_counted(two, [one, two])


@pytest.mark.needs("unshare", "nsenter")
def test_a_journal_that_cannot_be_renamed_over_loses_no_counts(short_dir):
    """If the journal's draft can't be renamed, because the journal is a mount point, no count is lost."""
    with two_workers(short_dir) as (mounted, service, one, two):
        assert_children_succeeded(one.call("fork_children", 4, 10, 2))
        wait_for((mounted.visible_path / "m.ipc.journal").exists, "the journal is written")
        with mounted.read_only("m.ipc.journal"):
            assert_children_succeeded(one.call("fork_children", 10, 10, 2))
            wait_for(lambda: journal_failures(two) > 1, "the journal can't be replaced")
            assert_children_succeeded(one.call("fork_children", 4, 10, 2))
            assert "m.ipc.journal.draft" not in os.listdir(mounted.visible_path)
            killed = service.kill_aggregator()
            assert_all_counted(two, [one, two])
            assert service.aggregator != killed
        assert_all_counted(two, [one, two])


def test_a_service_whose_directory_is_removed_counts_exactly(short_dir):
    """A service whose directory is removed and created again at run time counts every event."""
    directory = short_dir / "tapes"
    directory.mkdir()
    with crew(short_dir, directory) as service:
        one, two = service.start_worker(), service.start_worker()
        one.call("start_load")
        assert_children_succeeded(one.call("fork_children", 4, 10, 2))
        counted_before = two.call("read")["counts"][0]
        shutil.rmtree(directory)
        directory.mkdir()
        assert_children_succeeded(one.call("fork_children", 4, 10, 4))
        one.call("stop_load")
        assert_all_counted(two, [one, two])
        assert counted_before > 0
        assert service.start_worker().call("read")["counts"] == two.call("read")["counts"]
