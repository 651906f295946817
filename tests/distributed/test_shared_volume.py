"""Containers on one volume: several pid namespaces share an aggregator that is killed with its container."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from tests.contrib.services import Load, Service, gone_requests, has_ended
from tests.crew import stopped
from tests.distributed.containers import (
    UNSHARE,
    Container,
    decreases,
    killed_at_end,
    reads,
    stop_and_start_in_turn,
    worker_container,
)
from tests.processes import NOT_YET, ROOT, Clients, children, clean_environment, get, wait_for

pytestmark = pytest.mark.needs("unshare")


@pytest.fixture(autouse=True)
def namespaces() -> None:
    """Skip the test where this user can't make a pid namespace."""
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no pid namespace can be made: {tried.stderr.strip()}")


def test_containers_that_are_stopped_and_started_in_turn_lose_nothing(short_dir):
    """No container reads a total below one that any container had read before, and every event counts."""
    print(stop_and_start_in_turn(short_dir, rounds=4))


def test_a_single_container_that_restarts_keeps_its_totals(short_dir):
    """A container alone on its volume has all former totals after each restart."""
    container = worker_container(short_dir, "a", 2)
    with killed_at_end(container):
        for turn in range(3):
            container.start()
            wait_for(lambda many=20 * (turn + 1): len(reads(short_dir)) >= many, "the container reads")
            container.stop()
    found = reads(short_dir)
    assert decreases(found) == []
    assert found[-1].total > 0


class TotalReader(Clients):
    """A client that reads the number of requests from several ports, again and again."""

    def __init__(self, *ports: int) -> None:
        super().__init__(1)
        self.ports = ports
        self.seen = [0]

    def _request(self) -> None:
        while not self._stop.wait(0.02):
            for port in self.ports:
                with contextlib.suppress(*NOT_YET):
                    self.seen.append(gone_requests(port))


def test_two_gunicorns_on_one_volume_count_exactly_while_one_stops(short_dir):
    """While two gunicorns stop in turn under load, each answered request counts and no total decreases."""
    services, containers = [], []
    for name in "ab":
        (short_dir / name).mkdir()
        service = Service(short_dir / name, ["-w", "2", "--log-level", "warning"])
        environment = {**service.environment, "TAPES_ADDR": f"ipc://{short_dir}/m.ipc"}
        services.append(service)
        containers.append(Container(short_dir, name, service.command, **environment))
    ports = [service.port for service in services]
    path = "/old-catalogue"
    with killed_at_end(*containers):
        for container, service in zip(containers, services):
            container.start()
            service.wait_until_up()
        with Load(ports[0], path, 2) as a, Load(ports[1], path, 2) as b, TotalReader(*ports) as readers:
            for turn in range(4):
                stopping, running = (a, b) if turn % 2 == 0 else (b, a)
                stopping.wait_for_requests(100)
                containers[turn % 2].stop()
                running.wait_for_requests(200)
                containers[turn % 2].start()
                services[turn % 2].wait_until_up()
        containers[0].stop()
        answered, sent = a.answered + b.answered, a.sent + b.sent
        total = wait_for(
            lambda: (n := gone_requests(ports[1])) >= answered and n, f"{answered} are counted", 10
        )
        assert total <= sent
        assert get(ports[1], "/metrics")[0] == 200
    print(f"{answered} answered, {total} counted, {sent} sent; {len(readers.seen)} reads")
    assert readers.seen == sorted(readers.seen)
    assert len(readers.seen) > 40


PRIVATE = """
import os, sys, tapes
pid = os.fork()
if pid == 0:
    tapes.join()
    tapes.counter("c").increment(int(sys.argv[1]))
    sys.exit(0)
os.waitpid(pid, 0)
tapes.join()
print(os.environ["TAPES_ADDR"], flush=True)
for line in sys.stdin:
    try:
        print(tapes.get_stats().c.value, flush=True)
    except tapes.TapesError:
        print(-1, flush=True)
"""


@contextlib.contextmanager
def private_service(directory, count):
    """Run a container whose service has a private directory; one of its workers has counted and exited."""
    temporary = {"TMPDIR": str(directory), "XDG_RUNTIME_DIR": str(directory), "PYTHONPATH": str(ROOT)}
    with (directory / "output.log").open("ab") as log:
        process = subprocess.Popen(
            [*UNSHARE, sys.executable, "-c", PRIVATE, str(count)], cwd=directory, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=clean_environment(**temporary),
        )  # fmt: skip

    def total() -> int:
        process.stdin.write("\n")
        return int(process.stdout.readline())

    try:
        yield process, process.stdout.readline().strip().removeprefix("ipc://"), total
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_containers_that_share_a_temporary_directory_do_not_sweep_each_other(short_dir):
    """A starting container keeps the files of another one, though that one's aggregator is dead."""
    with private_service(short_dir, 200) as (one, address, total):
        assert total() == 200
        (first,) = children(one.pid)
        with stopped(first):
            (aggregator,) = children(first)
            os.kill(aggregator, signal.SIGKILL)
            wait_for(lambda: has_ended(aggregator), "the aggregator has ended")
            with private_service(short_dir, 5) as (_, other_address, other_total):
                assert other_total() == 5
                assert other_address != address
                assert os.path.exists(f"{address}.journal")
        wait_for(lambda: total() == 200, "another aggregator knows what the first one knew", 10)
