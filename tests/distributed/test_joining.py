"""A service that starts its own aggregator: one of them, as long as it is needed, and nothing after."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from tests.processes import free_port, get, wait_for


def run(home, program: str, *, status: int = 0, **environment: str) -> tuple[str, str]:
    """Run a program to its end; return what it and its aggregator said."""
    (home.directory / "program.py").write_text(program)
    ended, output, errors = home.run([sys.executable, "-W", "error", "program.py"], **environment)
    assert ended == status, errors
    return output, errors


@contextlib.contextmanager
def waiting(home, address: str | None = None, **environment: str):
    """A service of one process that waits to be ended."""
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


def test_whoever_comes_first_starts_the_aggregator(home):
    """Eight children race for it, their parent joins last: one aggregator, one line of log."""
    done = run(home, JOIN)
    assert done[0] == "83 1 8\n"
    (line,) = done[1].splitlines()
    assert "[INFO] tapes aggregator " in line
    assert "started for the process that it was forked from" in line


def test_spawned_children_and_their_parent_meet(home):
    """Whoever of them joins first: they find each other by their parent."""
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
    """By TAPES_ADDR, which they inherit; joining again is nothing."""
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


def test_an_aggregator_does_not_mind_signals_while_it_is_needed(home):
    """Service managers signal the whole group; it goes when the last of the service has gone."""
    with waiting(home) as process:
        (service,) = home.services()
        pid = int((service / "metrics.ipc.lock").read_text().split()[0])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(pid, number)
        # It answers after it has got them all.
        run(home, f"import tapes; tapes.join('ipc://{service}/metrics.ipc'); tapes.get_stats().c.value")
        assert process.poll() is None
        process.kill()


def test_what_was_killed_outright_is_swept_by_the_next_start(home):
    """The whole service at once; the next one starts from zero, and finds its own."""
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


def test_a_directory_that_is_in_use_is_not_swept(home):
    """Two services side by side: the second leaves the first alone, and neither sees the other."""
    with waiting(home):
        (service,) = home.services()
        other = (
            "import tapes; tapes.join(); tapes.counter('c').increment(5); print(tapes.get_stats().c.value)"
        )
        assert run(home, other)[0] == "5\n"
        assert (service / "metrics.ipc").exists()


def test_a_service_may_be_told_where_to_meet(home):
    """An explicit address; processes with nothing in common but that."""
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


def test_starting_one_can_be_forbidden_and_tapes_turned_off(home):
    """TAPES_AUTOSTART=0: reads say what is missing. TAPES_DISABLED=1: a registry of one process."""
    program = """
import tapes
tapes.join()
tapes.counter("c").increment(5)
print(tapes.get_stats().c.value)
tapes.close()
"""
    done = run(home, program, status=1, TAPES_AUTOSTART="0", TAPES_ADDR=f"ipc://{home.directory}/m.ipc")
    assert "did not answer" in done[1]
    (will,) = home.directory.glob("m.ipc.spool-*")
    will.unlink()
    done = run(home, program, TAPES_DISABLED="1", TAPES_ADDR=f"ipc://{home.directory}/m.ipc")
    assert done == ("5\n", "")


def test_reporters_come_from_the_environment(home):
    """TAPES_HTTP answers for the whole service; what can't be understood is an error that says so."""
    port = free_port()
    with waiting(home, TAPES_HTTP=str(port)):
        assert b'"c": {"value": 1}' in get(port, "/metrics")[2]
    wait_for(home.nothing_left, "nothing is left", 4)
    done = run(home, "import tapes; tapes.join()", status=1, TAPES_HTTP="eighty")
    assert "TAPES_HTTP: got 'eighty', expected PORT or HOST:PORT" in done[1]
    done = run(home, "import tapes; tapes.join()", status=1, TAPES_STATSD="localhost?intervall=5")
    assert "TAPES_STATSD: got 'localhost?intervall=5', expected [tcp://]HOST[:PORT]" in done[1]


def test_a_port_that_is_taken_is_an_error(home):
    """And not an aggregator that is there already."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(home, "import tapes; tapes.join()", status=1, TAPES_HTTP=port)
    assert f"HTTPReporter can't listen on 127.0.0.1:{port}" in done[1]


def test_what_can_not_be_started_says_why(home):
    """A typed error, and nothing left."""
    for address, words in (("ipc:///nowhere/m.ipc", "a directory that exists"), ("here", "ipc://PATH")):
        done = run(home, f"import tapes; tapes.join({address!r})", status=1)
        assert "AddressError" in done[1]
        assert words in done[1]
    (home.directory / "plain").write_text("precious")
    done = run(home, "import tapes; tapes.join('ipc://plain')", status=1)
    assert "is not a socket" in done[1]
    assert not list(home.directory.glob("plain.*"))


def test_forks_while_another_thread_joins(home):
    """The children hold no lock and no pipe of the join: it returns, and so does that of others."""
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


def test_turned_off_it_needs_nothing(home):
    """TAPES_DISABLED=1 works without pyzmq."""
    (home.directory / "zmq.py").write_text("raise ModuleNotFoundError('zmq')\n")
    program = "import tapes; tapes.join(); tapes.connect('ipc://m'); tapes.counter('c'); tapes.close()"
    assert run(home, program, TAPES_DISABLED="1", TAPES_ADDR="here") == ("", "")
    assert "pip install 'tapes[distributed]'" in run(home, program, status=1)[1]


def test_a_directory_that_went_away(home):
    """TAPES_ADDR of a private directory that is gone, with its parent: the service meets elsewhere."""
    given = {"TAPES_ADDR": "ipc:///gone/tapes-1-2/metrics.ipc"}
    program = "import os, tapes; tapes.join(); print(os.environ['TAPES_ADDR'])"
    assert run(home, program, **given)[0] == f"ipc://{home.private}/tapes-1-2/metrics.ipc\n"
