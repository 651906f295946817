"""Gunicorn workers behind one port: every worker gives the same exact answer, and nothing is left."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.contrib.services import Service, counts, cpu_times, gone_requests, session, signal_to, timed
from tests.processes import EXAMPLES, get, mentions, running, wait_for

CLASSES = {
    "sync": ["-w", "4"],
    "gthread": ["-w", "4", "-k", "gthread", "--threads", "4"],
}
REQUESTS = {  # path: number of requests, and their series
    "/": (6000, ("GET", "/", "200")),
    "/articles/7": (3000, ("GET", "/articles/<int:number>", "200")),
    "/articles/901": (4000, ("GET", "/articles/<int:number>", "404")),
    "/old-catalogue": (3000, ("GET", "/old-catalogue", "410")),
    "/broken": (1000, ("GET", "/broken", "500")),
    "/no/such/page": (1500, ("GET", "<unmatched>", "404")),
    "/nor/this?q=1": (1500, ("GET", "<unmatched>", "404")),
}


@pytest.mark.needs("ab")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("worker_class", CLASSES)
def test_every_worker_gives_the_same_exact_counts(short_dir, worker_class):
    """After 20,000 requests with five kinds of outcome, every gunicorn worker shows the same exact counts."""
    service = Service(short_dir, CLASSES[worker_class] + ["--log-level", "warning"])
    expected: dict[tuple[str, str, str], int] = {}
    with service.running() as process:
        service.wait_until_up()
        for path, (number, series) in REQUESTS.items():
            url = f"http://127.0.0.1:{service.port}{path}"
            done = subprocess.run(
                ["ab", "-q", "-n", str(number), "-c", "16", url], capture_output=True, text=True, check=True
            )
            assert f"Complete requests:      {number}\n" in done.stdout
            expected[series] = expected.get(series, 0) + number
        wait_for(lambda: counts(service.port) == expected, "the counts are exact")
        for _ in range(24):  # enough to meet every worker
            assert counts(service.port) == expected
        stats = json.loads(get(service.port, "/metrics")[2])
        assert stats["http"]["server"]["active_requests"]["value"] == 0
        assert stats["shop"]["price"]["lookup"]["count"] == REQUESTS["/articles/7"][0]
        process.terminate()
        assert process.wait(10) == 0
    wait_for(service.nothing_left, "no process and no file is left")


def test_reads_go_to_every_worker(short_dir):
    """Requests reach all four workers, so tests that read repeatedly read from each of them."""
    service = Service(short_dir, ["-w", "4", "--log-level", "warning"])
    with service.running():
        service.wait_until_up()
        seen: set[str] = set()
        wait_for(lambda: seen.add(get(service.port, "/")[1]["X-Worker"]) or len(seen) == 4, "all answer")


@pytest.mark.needs("promtool")
def test_promtool_accepts_the_metrics_of_gunicorn(short_dir):
    """promtool reports no problem in the metrics of an application under gunicorn."""
    service = Service(short_dir, ["-w", "2", "--log-level", "warning"])
    with service.running():
        service.wait_until_up()
        for path in REQUESTS:
            get(service.port, path)
        wait_for(lambda: sum(counts(service.port).values()) == len(REQUESTS), "all requests are counted", 5)
        status, headers, text = get(service.port, "/metrics", Accept="text/plain")
        assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert b"http_server_request_duration_seconds_bucket" in text
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


@pytest.mark.alone
@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, False),
        (signal.SIGINT, True),
        (signal.SIGQUIT, False),
        (signal.SIGKILL, True),  # if only the master is killed, gunicorn's idle workers run for 15 s
    ],
)
def test_gunicorn_exits_cleanly_and_leaves_nothing(short_dir, number, whole_group):
    """At SIGTERM, SIGINT, SIGQUIT or SIGKILL gunicorn leaves no process, no file and no traceback."""
    service = Service(short_dir, ["-w", "2"])
    with service.running() as process:
        service.wait_until_up()
        get(service.port, "/")
        aggregators = [pid for pid in mentions(str(service.private)) if pid not in session(process.pid)]
        assert len(aggregators) == 1
        # A worker that still handles its last request would log gunicorn's own SystemExit.
        seen = [""]
        wait_for(lambda: seen.append(cpu_times(process.pid)) or seen[-1] == seen[-2], "it is idle")
        for pid in session(process.pid) if whole_group else [process.pid]:
            signal_to(pid, number)
        process.wait(10)
        wait_for(lambda: not mentions(str(short_dir)), "no process is left", 4)
        wait_for(
            lambda: not [p for p in service.private.iterdir() if "tapes" in p.name], "no file of ours", 4
        )
    assert "Traceback" not in service.output()


CANNOT_START = {
    "not a socket": "is not a socket",
    "no directory": "a directory that exists",
    "path too long": "at most 107",
    "bad address": "ipc://PATH",
}


@pytest.mark.parametrize("case", CANNOT_START)
def test_gunicorn_exits_with_one_sentence_if_no_aggregator_can_start(short_dir, case):
    """If no aggregator can start, gunicorn exits with status 1 and one sentence, and leaves nothing."""
    plain = short_dir / "plain"
    plain.write_text("precious")
    address = {
        "not a socket": f"ipc://{plain}",
        "no directory": f"ipc://{short_dir}/nowhere/m.ipc",
        "path too long": "ipc:///" + "x" * 200,
        "bad address": "here",
    }[case]
    service = Service(short_dir, ["-w", "2", "--log-level", "warning"], TAPES_ADDR=address)
    with service.running() as process:
        assert process.wait(20) == 1
    lines = service.output().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tapes: ")
    assert CANNOT_START[case] in lines[0]
    assert plain.read_text() == "precious"
    wait_for(service.nothing_left, "nothing is left")


def test_without_pyzmq_gunicorn_exits_and_shows_what_to_install(short_dir):
    """Without pyzmq gunicorn exits with status 1 and one sentence that shows what to install."""
    (short_dir / "zmq.py").write_text("raise ModuleNotFoundError('zmq')\n")
    service = Service(short_dir, ["-w", "1", "--log-level", "warning"], PYTHONPATH=str(short_dir))
    with service.running() as process:
        assert process.wait(20) == 1
    (line,) = service.output().splitlines()
    assert "pip install 'tapes[distributed]'" in line


def test_an_aggregator_that_runs_already_is_used_and_stays(short_dir):
    """Two services with the TAPES_ADDR of a running aggregator share it, and it keeps running after both."""
    address = f"ipc://{short_dir}/m.ipc"
    program = (
        f"from tapes.distributed.registry import *; RegistryAggregator([], {address!r}).start(fork=False)"
    )
    own = short_dir / "own"
    own.mkdir()
    with running([sys.executable, "-c", program], cwd=own) as aggregator:
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        for turn in (1, 2):
            directory = short_dir / f"s{turn}"
            directory.mkdir()
            service = Service(directory, ["-w", "2", "--log-level", "warning"], TAPES_ADDR=address)
            with service.running():
                service.wait_until_up()
                before = gone_requests(service.port)
                get(service.port, "/old-catalogue")
                assert before == turn - 1
                wait_for(lambda port=service.port, n=turn: gone_requests(port) == n, "the request is counted")
                assert gone_requests(service.port) == turn
        assert aggregator.poll() is None


def test_two_services_of_one_user_are_separate(short_dir):
    """Two services of one user below one TMPDIR have private directories and separate counts."""
    for name in ("1", "2"):
        (short_dir / name).mkdir()
    one, two = (Service(short_dir / name, ["-w", "2", "--log-level", "warning"]) for name in ("1", "2"))
    two.environment.update(TMPDIR=str(one.private), XDG_RUNTIME_DIR=str(one.private))
    with one.running(), two.running():
        one.wait_until_up()
        two.wait_until_up()
        for _ in range(5):
            get(one.port, "/old-catalogue")
        wait_for(lambda: gone_requests(one.port) == 5, "all is counted")
        assert gone_requests(two.port) == 0


def test_metrics_of_a_worker_that_is_not_connected_are_a_503(short_dir):
    """A worker that may not start an aggregator answers ``/metrics`` by 503, and the application works."""
    service = Service(short_dir, ["-w", "2", "--log-level", "warning"], TAPES_AUTOSTART="0")
    at = service.command.index("-c")
    del service.command[at : at + 2]
    with service.running():
        wait_for(lambda: get(service.port, "/"), "gunicorn is up")
        assert get(service.port, "/")[0] == 200
        status, _, text = get(service.port, "/metrics")
        assert status == 503
        assert b"TAPES_AUTOSTART" in text


@pytest.mark.alone
def test_a_stopped_aggregator_is_a_503_in_time_and_the_application_works(short_dir):
    """While the aggregator is stopped, ``/metrics`` is a 503 within 1.5 s; afterwards all is counted."""
    service = Service(short_dir, ["-w", "2", "--log-level", "warning"])
    with service.running() as process:
        service.wait_until_up()
        (aggregator,) = (p for p in mentions(str(service.private)) if p not in session(process.pid))
        signal_to(aggregator, signal.SIGSTOP)
        tries = [timed(get, service.port, "/metrics") for _ in range(2)]  # the machine may be busy
        assert min(seconds for _, seconds in tries) < 1.5
        status, headers, text = tries[0][0]
        assert (status, headers["Content-Type"]) == (503, "text/plain; charset=utf-8")
        assert b"did not answer" in text
        before = [get(service.port, "/old-catalogue")[0] for _ in range(10)]
        assert before == [410] * 10
        signal_to(aggregator, signal.SIGCONT)
        wait_for(lambda: get(service.port, "/metrics")[0] == 200, "it answers again")
        wait_for(lambda: gone_requests(service.port) == 10, "all is counted")


def test_the_spelling_without_python_works_beside_the_example_file(short_dir):
    """``gunicorn -c tapes.contrib.gunicorn_conf`` works in a directory that has the one-line file."""
    for name in ("tapes.contrib.gunicorn_conf", "flask_shop.py"):
        shutil.copy(EXAMPLES / name, short_dir)
    service = Service(short_dir, ["-w", "2", "--log-level", "warning"])
    at = service.command.index("python:tapes.contrib.gunicorn_conf")
    service.command[at] = "tapes.contrib.gunicorn_conf"
    with service.running():
        service.wait_until_up()
        get(service.port, "/old-catalogue")
        wait_for(lambda: gone_requests(service.port) == 1, "the request is counted")


def test_the_port_of_gunicorn_is_free_when_it_has_exited(short_dir):
    """The aggregator holds no socket of gunicorn: its port can be bound as soon as it has exited."""
    service = Service(short_dir, ["-w", "1", "--log-level", "warning"])
    with service.running() as process:
        service.wait_until_up()
        process.terminate()
        process.wait(10)
        with socket.create_server(("127.0.0.1", service.port)):
            pass
