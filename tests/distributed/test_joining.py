"""A service that starts its own aggregator has exactly one, as long as it runs, and leaves no files."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from tests.processes import free_port, get, wait_for


def run(home, program: str, *, status: int = 0, **environment: str) -> tuple[str, str]:
    """Run a program to its end; return its output, and the log of the program and its aggregator."""
    (home.directory / "program.py").write_text(program)
    ended, output, errors = home.run([sys.executable, "-W", "error", "program.py"], **environment)
    assert ended == status, errors
    return output, errors


@contextlib.contextmanager
def waiting(home, address: str | None = None, **environment: str):
    """A service of one process that waits for a signal."""
    (home.directory / "waiting.py").write_text(WAIT.format(address=address))
    with home.running([sys.executable, "-W", "error", "waiting.py"], **environment) as process:
        log = home.directory / "output.log"
        wait_for(lambda: "up" in log.read_text(), "the service is up")
        yield process


JOIN = """
import os, signal, sys, tapes
children = []
for number in range(8):
    pid = os.fork()
    if pid == 0:
        tapes.join()
        tapes.counter("c").increment(10)
        sys.exit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
tapes.join()
tapes.counter("c").increment(3)
stats = tapes.get_stats()
print(stats.c.value, *(stats.tapes.workers[f'{{state="{state}"}}'].value for state in ("live", "retired")))
"""


def test_the_first_process_that_joins_starts_the_aggregator(home):
    """Of eight children and their parent that join at once, one starts the aggregator; it logs one line."""
    done = run(home, JOIN)
    assert done[0] == "83 1 8\n"
    (line,) = done[1].splitlines()
    assert "[INFO] tapes aggregator " in line
    assert "started for the process that it was forked from" in line


def test_spawned_children_and_their_parent_meet(home):
    """Spawned children and their parent have one aggregator, whichever of them joins first."""
    done = run(
        home,
        """
import multiprocessing, tapes

def work():
    tapes.join()
    tapes.counter("c").increment(10)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=work) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    tapes.join()
    print(tapes.get_stats().c.value)
""",
    )
    assert done[0] == "40\n"
    assert done[1].count("tapes aggregator") == 1


def test_programs_that_a_service_starts_join_it(home):
    """A program that a service starts finds it by the inherited TAPES_ADDR; joining twice is harmless."""
    done = run(
        home,
        """
import subprocess, sys, tapes
tapes.join()
tapes.join()
for joining in ("", "tapes.join();"):
    program = f"import tapes; {joining} tapes.counter('c').increment(5)"
    subprocess.run([sys.executable, "-c", program], check=True)
print(tapes.get_stats().c.value)
""",
    )
    assert done[0] == "10\n"
    assert done[1].count("tapes aggregator") == 1


WAIT = """
import os, signal, sys, tapes
tapes.join({address!r})
tapes.counter("c").increment()
tapes.get_stats()
print("up", flush=True)
signal.pause()
"""


def test_an_aggregator_ignores_signals_while_its_service_runs(home):
    """A service manager signals the whole process group: the aggregator exits only after the service."""
    with waiting(home) as process:
        (service,) = home.services()
        pid = int((service / "metrics.ipc.lock").read_text().split()[0])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(pid, number)
        # It answers after it has got them all.
        run(home, f"import tapes; tapes.join('ipc://{service}/metrics.ipc'); tapes.get_stats().c.value")
        assert process.poll() is None
        process.kill()


def test_the_next_service_removes_the_files_of_a_killed_one(home):
    """After a whole service was killed, the next one removes its directory and starts from zero."""
    with waiting(home) as process:
        (service,) = home.services()
        for pid in (int((service / "metrics.ipc.lock").read_text().split()[0]), process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert home.services() == [service]
    assert run(home, """
import tapes
tapes.join()
tapes.counter("c").increment(5)
print(tapes.get_stats().c.value)
""")[0] == "5\n"  # fmt: skip
    assert not service.exists()


def test_the_directory_of_a_running_service_is_not_removed(home):
    """A second service keeps the directory of the first one, and neither sees the other's counts."""
    with waiting(home):
        (service,) = home.services()
        other = (
            "import tapes; tapes.join(); tapes.counter('c').increment(5); print(tapes.get_stats().c.value)"
        )
        assert run(home, other)[0] == "5\n"
        assert (service / "metrics.ipc").exists()


def test_unrelated_processes_meet_at_an_explicit_address(home):
    """Processes that have only an address in common share one aggregator there."""
    address = f"ipc://{home.directory}/here.ipc"
    program = f"""
import tapes
tapes.join({address!r})
tapes.counter("c").increment(5)
print(tapes.get_stats().c.value)
"""
    with waiting(home, address):
        assert [run(home, program)[0] for _ in range(2)] == ["6\n", "11\n"]
    wait_for(lambda: not list(home.directory.glob("here*")), "no file is left", 4)


def test_TAPES_AUTOSTART_and_TAPES_DISABLED(home):
    """With TAPES_AUTOSTART=0 reads fail with a reason; with TAPES_DISABLED=1 they show this process only."""
    program = """
import tapes
tapes.join()
tapes.counter("c").increment(5)
print(tapes.get_stats().c.value)
tapes.close()
"""
    done = run(home, program, status=1, TAPES_AUTOSTART="0", TAPES_ADDR=f"ipc://{home.directory}/m.ipc")
    assert "did not answer" in done[1]
    (spooled,) = home.directory.glob("m.ipc.spool-*")
    spooled.unlink()
    done = run(home, program, TAPES_DISABLED="1", TAPES_ADDR=f"ipc://{home.directory}/m.ipc")
    assert done == ("5\n", "")


def test_reporters_come_from_the_environment(home):
    """TAPES_HTTP answers for the whole service; a malformed setting is an error with the expected form."""
    port = free_port()
    with waiting(home, TAPES_HTTP=str(port)):
        assert b'"c": {"value": 1}' in get(port, "/metrics")[2]
    wait_for(home.nothing_left, "nothing is left", 4)
    done = run(home, "import tapes; tapes.join()", status=1, TAPES_HTTP="eighty")
    assert "TAPES_HTTP: got 'eighty', expected PORT or HOST:PORT" in done[1]
    done = run(home, "import tapes; tapes.join()", status=1, TAPES_STATSD="localhost?intervall=5")
    assert "TAPES_STATSD: got 'localhost?intervall=5', expected [tcp://]HOST[:PORT]" in done[1]


def test_a_TAPES_HTTP_port_in_use_is_an_error(home):
    """join() raises if another program uses the port of TAPES_HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(home, "import tapes; tapes.join()", status=1, TAPES_HTTP=port)
    assert f"HTTPReporter can't listen on 127.0.0.1:{port}" in done[1]


def test_an_aggregator_that_cannot_start_is_an_error_with_the_reason(home):
    """join() raises AddressError with the reason if no aggregator can start, and leaves no file."""
    for address, remedy in (("ipc:///nowhere/m.ipc", "a directory that exists"), ("here", "ipc://PATH")):
        done = run(home, f"import tapes; tapes.join({address!r})", status=1)
        assert "AddressError" in done[1]
        assert remedy in done[1]
    (home.directory / "plain").write_text("precious")
    done = run(home, "import tapes; tapes.join('ipc://plain')", status=1)
    assert "is not a socket" in done[1]
    assert not list(home.directory.glob("plain.*"))


def test_forks_while_another_thread_joins(home):
    """Children that are forked during a join hold none of its locks and pipes, so it returns."""
    program = """
import os, subprocess, sys, threading, time, tapes
joining = threading.Thread(target=tapes.join)
joining.start()
children = []
while joining.is_alive() and len(children) < 50:
    pid = os.fork()
    if pid == 0:
        time.sleep(100)
        os._exit(0)
    children.append(pid)
    joining.join(0.02)
joining.join()
other = "import tapes; tapes.join(); tapes.counter('c').increment(5)"
subprocess.run([sys.executable, "-c", other], check=True)
tapes.counter("c").increment()
print(tapes.get_stats().c.value)
for pid in children:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""
    (home.directory / "program.py").write_text(program)
    status, output, errors = home.run([sys.executable, "-W", "ignore", "program.py"], seconds=80)
    assert (status, output) == (0, "6\n"), errors  # in less time than the children live


def test_with_TAPES_DISABLED_pyzmq_is_not_needed(home):
    """With TAPES_DISABLED=1 the package works without pyzmq."""
    (home.directory / "zmq.py").write_text("raise ModuleNotFoundError('zmq')\n")
    program = "import tapes; tapes.join(); tapes.connect('ipc://m'); tapes.counter('c'); tapes.close()"
    assert run(home, program, TAPES_DISABLED="1", TAPES_ADDR="here") == ("", "")
    assert "pip install 'tapes[distributed]'" in run(home, program, status=1)[1]


def test_a_service_whose_TAPES_ADDR_is_gone_meets_elsewhere(home):
    """If TAPES_ADDR is a private directory that was removed with its parent, the service meets elsewhere."""
    given = {"TAPES_ADDR": "ipc:///gone/tapes-1-2/metrics.ipc"}
    program = "import os, tapes; tapes.join(); print(os.environ['TAPES_ADDR'])"
    assert run(home, program, **given)[0] == f"ipc://{home.private}/tapes-1-2/metrics.ipc\n"
