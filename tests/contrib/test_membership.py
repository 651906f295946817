"""Adapters join a service without a call; each program here is one process of several."""

from __future__ import annotations

import sys

import pytest

from tests.processes import wait_for

PROLOGUE = """
import io, json, os, sys, threading
import tapes
pid = os.fork()  # so that the program has a parent, which identifies the service
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
from tapes.contrib.wsgi import TapesMiddleware

def bare(environ, start_response):
    start_response("200 OK", [])
    return [b"x"]

def ask(app, path="/", several=True):
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "wsgi.multiprocess": several}
    status = []
    body = app(environ, lambda line, headers: status.append(line[:3]))
    data = b"".join(body)
    if hasattr(body, "close"):
        body.close()
    return int(status[0]), data

def counted(app):
    status, data = ask(app, "/metrics")
    assert status == 200, (status, data)
    tree = json.loads(data)["http"]["server"].get("request", {}).get("duration", {})
    return sum(one["count"] for one in tree.values()), json.loads(data)["tapes"]["workers"]
"""


def run(home, program, **environment):
    """Run a program after the prologue and return its output."""
    status, output, errors = home.run([sys.executable, "-c", PROLOGUE + program], **environment)
    assert status == 0, errors
    return output.strip()


def test_threads_with_the_first_requests_join_once(home):
    """If 32 threads serve the first requests at once, the process joins once and each request counts."""
    program = """
app = TapesMiddleware(bare)
together = threading.Barrier(32)
def first():
    together.wait()
    for _ in range(50):
        ask(app)
threads = [threading.Thread(target=first) for _ in range(32)]
[t.start() for t in threads]; [t.join() for t in threads]
count, workers = counted(app)
print(count, workers['{state="live"}']["value"], len(os.listdir(os.environ["TMPDIR"])))
"""
    assert run(home, program) == "1600 1 1"


def test_an_adapter_joins_at_tapes_addr_and_starts_an_aggregator_if_allowed(home):
    """An adapter joins at TAPES_ADDR and starts an aggregator there, unless TAPES_AUTOSTART is 0."""
    program = """
app = TapesMiddleware(bare)
ask(app)
print(ask(app, "/metrics")[0])
"""
    address = f"ipc://{home.directory}/m.ipc"
    assert run(home, program, TAPES_ADDR=address) == "200"
    wait_for(home.nothing_left, "nothing is left")
    assert run(home, program, TAPES_ADDR=address, TAPES_AUTOSTART="0") == "503"


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_children_of_python_and_c_forks_are_workers_of_their_own(home, fork):
    """Children forked by Python or in C are workers of their own, and each request counts once."""
    program = f"""
import ctypes
app = TapesMiddleware(bare)
for _ in range(7):
    ask(app, several={fork == "os.fork"})
children = []
for _ in range(3):
    pid = {fork}()
    if not pid:
        try:
            for _ in range(100):
                ask(app)
            app._adapter.service.leave()
            os._exit(0)
        finally:
            os._exit(1)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
tapes.join()
print(counted(app)[0])
"""
    assert run(home, program) == "307"


@pytest.mark.parametrize("registry", ["tapes.Registry()", "tapes.DistributedRegistry({address!r})"])
def test_an_adapter_with_a_registry_joins_with_that_one_only(home, registry):
    """An adapter with a registry joins with that registry only; one with an address joins there."""
    made = registry.format(address=f"ipc://{home.directory}/m.ipc")
    program = f"""
registry = {made}
app = TapesMiddleware(bare, registry)
ask(app)
print(counted(app)[0], tapes.default_registry.session.is_connected, registry.session.is_connected)
"""
    assert run(home, program) == "1 False True"


def test_a_worker_that_left_joins_again_with_the_next_request(home):
    """A worker that left its service, as at a lifespan's end, joins again with its next request."""
    program = """
app = TapesMiddleware(bare)
for _ in range(3):
    ask(app)
    app._adapter.service.leave()
ask(app)
print(counted(app)[0])
"""
    assert run(home, program) == "4"


def test_a_middleware_made_in_a_pool_process_starts_nothing(home):
    """A middleware that is made in a process of multiprocessing, but serves no request, starts nothing."""
    program = """
import multiprocessing
def make(n):
    TapesMiddleware(bare)
    return os.listdir(os.environ["TMPDIR"])
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(sum(pool.map(make, range(4)), []))
"""
    assert run(home, program) == "[]"
