"""A service that is stopped and started again at once finds its fixed ports and addresses free."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time

import pytest

from tests.contrib.services import Service
from tests.processes import Home, free_port, get, mentions, running, wait_for


def own_count(port: int) -> int:
    """Return how many requests are counted by the service that answers on ``port``."""
    tree = json.loads(get(port, "/metrics")[2])
    for name in ("http", "server", "request", "duration"):
        tree = tree.get(name, {})
    return sum(values["count"] for values in tree.values())


@pytest.mark.timeout(180)
def test_each_of_five_restarts_in_a_row_serves_on_its_http_port(short_dir):
    """Each of five restarts in a row serves TAPES_HTTP, although the former aggregator still runs for 2 s."""
    http = free_port()
    service = Service(short_dir, ["-w", "2", "--log-level", "warning"], TAPES_HTTP=str(http))
    for requests in range(1, 6):
        with service.running() as process:
            service.wait_until_up()
            for _ in range(requests):
                get(service.port, "/old-catalogue")
            wait_for(lambda n=requests: own_count(http) == n, "the port is served by this run", 5)
            process.terminate()
            assert process.wait(10) == 0
    wait_for(service.nothing_left, "no process and no file is left")


BY_HAND = """
import signal, sys, tapes
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.reporting.http import HTTPReporter
RegistryAggregator(HTTPReporter(int(sys.argv[1])), sys.argv[2]).start()
registry = DistributedRegistry(sys.argv[2])
registry.connect()
registry.counter("c").increment(int(sys.argv[3]))
print(registry.get_stats().c.value, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("address", ["ipc://m.ipc", "ipc://@tapes-{port}", "tcp://127.0.0.1:{port}"])
def test_an_aggregator_by_hand_can_be_restarted_at_its_address(short_dir, address):
    """A program that is killed and started at once starts its aggregator at the same address and port."""
    http, port = free_port(), free_port()
    free_port()  # the next port is that for reads
    for n in range(1, 5):
        command = [sys.executable, "-c", BY_HAND, str(http), address.format(port=port), str(n)]
        with running(command, cwd=short_dir) as process:
            wait_for(lambda: (short_dir / "output.log").read_text() == f"{n}\n", "it is up", 10)  # noqa: B023
            assert json.loads(get(http, "/")[2])["c"]["value"] == n
            process.send_signal(signal.SIGKILL)
            process.wait()
    wait_for(lambda: not mentions(str(short_dir)), "no process is left")


@pytest.mark.alone  # the process has to join within the 2 s
def test_an_idle_aggregator_that_another_process_joins_listens_again(short_dir):
    """If a process joins within the 2 s of grace, the aggregator listens again, with all that it counted."""
    home, http = Home(short_dir), free_port()
    address = f"ipc://{short_dir}/m.ipc"
    environment = {"TAPES_HTTP": str(http), "TAPES_ADDR": address}
    command = [sys.executable, "-c", "import tapes; tapes.join(); tapes.counter('c').increment()"]
    assert home.run(command, **environment)[0] == 0
    wait_for(lambda: not listens(http), "it does not listen any more", 1)
    with home.running([sys.executable, "-c", f"{command[-1]}; import signal; signal.pause()"], **environment):
        wait_for(lambda: json.loads(get(http, "/")[2])["c"]["value"] == 2, "it listens again", 5)
    wait_for(home.nothing_left, "nothing is left")


def listens(port: int) -> bool:
    """Return whether a connection to ``port`` is accepted."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.alone  # the port has to become free within the 4 s
def test_a_start_waits_for_a_port_that_becomes_free_within_four_seconds(short_dir):
    """A start waits up to 4 s for TAPES_HTTP's port; meanwhile other workers connect and read."""
    home = Home(short_dir)
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        http = taken.getsockname()[1]
        environment = {"TAPES_HTTP": str(http), "TAPES_ADDR": f"ipc://{short_dir}/m.ipc"}
        code = "import tapes; {}; tapes.counter('c').increment(5); tapes.get_stats(); print('up', flush=True)"
        starting = [sys.executable, "-c", code.format("tapes.join()") + "; import signal; signal.pause()"]
        process = stack.enter_context(home.running(starting, **environment))
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        started = time.monotonic()
        status, output, errors = home.run(
            [sys.executable, "-c", code.format("tapes.connect()")], **environment
        )
        assert (status, output) == (0, "up\n"), errors
        assert time.monotonic() - started < 3
        assert "up" not in (short_dir / "output.log").read_text()
        taken.close()
        wait_for(lambda: "up" in (short_dir / "output.log").read_text(), "it has started", 10)
        assert json.loads(get(http, "/")[2])["c"]["value"] == 10
        process.terminate()
    wait_for(home.nothing_left, "nothing is left")
