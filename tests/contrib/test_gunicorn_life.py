"""Gunicorn workers that start and exit in every way that gunicorn has; each answered request counts once."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.contrib.services import Load, Service, counts, gone_requests, has_ended, session, signal_to
from tests.processes import EXAMPLES, children, get, mentions, python_for_any_user, wait_for

GONE = "/old-catalogue"


def stats(service):
    """Return the tree of metrics that a worker shows."""
    return json.loads(get(service.port, "/metrics")[2])


@pytest.mark.timeout(300)
def test_requests_of_recycled_workers_count_exactly(short_dir):
    """With max_requests 20,000 requests over about 130 workers count exactly, and nothing is left."""
    if shutil.which("ab") is None:
        pytest.skip("not installed: ab")
    service = Service(short_dir, ["-w", "2", "--max-requests", "150", "--log-level", "warning"])
    with service.running():
        service.wait_until_up()
        url = f"http://127.0.0.1:{service.port}{GONE}"
        subprocess.run(["ab", "-q", "-n", "20000", "-c", "8", url], capture_output=True, check=True)
        wait_for(lambda: gone_requests(service.port) == 20_000, "all is counted")
        retired = stats(service)["tapes"]["workers"]['{state="retired"}']["value"]
        assert retired >= 20_000 // 150 - 2
        assert stats(service)["http"]["server"]["active_requests"]["value"] == 0
    wait_for(service.nothing_left, "nothing is left")


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_reloads_under_load_count_exactly(short_dir, preload):
    """Requests during three reloads by SIGHUP are all answered and each counts once."""
    service = Service(short_dir, ["-w", "2", "--log-level", "warning", *preload])
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, GONE) as load:
            for _ in range(3):
                load.wait_for_requests()
                before = children(process.pid)
                process.send_signal(signal.SIGHUP)
                wait_for(lambda b=before: not b & children(process.pid), "the workers are new")
            load.wait_for_requests()
        assert load.answered == load.sent
        wait_for(lambda: gone_requests(service.port) == load.answered, f"{load.answered} are counted")
        process.terminate()
        process.wait(10)
    wait_for(service.nothing_left, "nothing is left")


def test_an_upgrade_under_load_counts_exactly(short_dir):
    """After SIGUSR2 and SIGTERM the new master keeps the aggregator and its counts; no request is lost."""
    pidfile = short_dir / "pid"
    service = Service(short_dir, ["-w", "2", "--log-level", "warning", "--pid", str(pidfile)])
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, GONE) as load:
            load.wait_for_requests()
            process.send_signal(signal.SIGUSR2)
            wait_for(lambda: (short_dir / "pid.2").exists(), "the new master starts")
            master = int((short_dir / "pid.2").read_text())
            wait_for(lambda: len(children(master)) == 2, "it has workers")
            load.wait_for_requests()
            process.terminate()
            process.wait(20)
            load.wait_for_requests()
        assert load.answered == load.sent
        wait_for(lambda: gone_requests(service.port) == load.answered, f"{load.answered} are counted")
        assert len(list(service.private.glob("tapes-*"))) == 1
        os.kill(master, signal.SIGTERM)
        wait_for(service.nothing_left, "nothing is left")


@pytest.mark.alone
def test_a_killed_worker_loses_at_most_its_last_interval(short_dir):
    """A worker killed under load loses at most what it answered in its last 0.2 s; others lose nothing."""
    service = Service(short_dir, ["-w", "3", "--log-level", "warning"])
    with service.running() as process:
        service.wait_until_up()
        kills = []
        with Load(service.port, GONE) as load:
            for _ in range(3):
                load.wait_for_requests()
                victim = min(children(process.pid))
                kills.append(time.monotonic())
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda v=victim: v not in children(process.pid), "another one comes")
            load.wait_for_requests()
        wait_for(lambda: stats(service)["tapes"]["workers"]['{state="live"}']["value"] == 3, "all are there")
        late = sum(kill - 0.2 < answered < kill + 0.05 for kill in kills for answered in load.times)
        wait_for(lambda: gone_requests(service.port) >= load.answered - late, f"no more than {late} are lost")
        assert gone_requests(service.port) <= load.sent
    wait_for(service.nothing_left, "nothing is left")


def test_counts_of_a_worker_that_gunicorn_aborts_are_kept(short_dir):
    """A worker that gunicorn aborts for its timeout has published what it counted until then."""
    (short_dir / "slow.py").write_text("""
import time, tapes
from flask import Flask
from tapes.contrib.flask import TapesMiddleware
app = Flask(__name__)
app.wsgi_app = TapesMiddleware(app.wsgi_app)

@app.get("/slow")
def slow():
    tapes.counter("begun").increment(1000)
    time.sleep(30)

@app.get("/")
def index():
    return "fast"
""")
    service = Service(short_dir, ["-w", "2", "--timeout", "3", "--log-level", "critical"])
    service.command[-1] = "slow:app"
    service.command[service.command.index("--chdir") + 1] = str(short_dir)
    with service.running():
        service.wait_until_up()
        for _ in range(2):
            with contextlib.suppress(OSError, http.client.HTTPException):  # or it answers 500
                get(service.port, "/slow")
        wait_for(lambda: stats(service).get("begun", {}).get("value") == 2000, "what it began is counted")
    wait_for(service.nothing_left, "nothing is left")


def test_an_application_that_cannot_be_loaded_leaves_nothing(short_dir):
    """If workers fail to boot, gunicorn exits, its aggregator exits too, and nothing is left."""
    (short_dir / "broken.py").write_text("raise RuntimeError('no application here')\n")
    service = Service(short_dir, ["-w", "2", "--log-level", "critical"])
    service.command[-1] = "broken:app"
    service.command[service.command.index("--chdir") + 1] = str(short_dir)
    with service.running() as process:
        assert process.wait(20) != 0
        wait_for(service.nothing_left, "nothing is left")


def test_counts_from_preloading_count_once(short_dir):
    """Events recorded while the application is preloaded count once for all workers and their successors."""
    (short_dir / "seven.py").write_text("""
import tapes
from flask import Flask
from tapes.contrib.flask import TapesMiddleware
tapes.counter("seven").increment(7)
tapes.gauge("five").set(5)
app = Flask(__name__)
app.wsgi_app = TapesMiddleware(app.wsgi_app)
""")
    service = Service(short_dir, ["-w", "3", "--preload", "--log-level", "critical"])
    service.command[-1] = "seven:app"
    service.command[service.command.index("--chdir") + 1] = str(short_dir)
    with service.running() as process:
        service.wait_until_up()
        for _ in range(2):
            wait_for(lambda: stats(service).get("seven", {}).get("value") == 7, "seven are seven")
            assert stats(service)["five"]["value"] == 5
            before = children(process.pid)
            # A worker that is just starting ignores the first SIGTERM.
            wait_for(
                lambda b=before: not [signal_to(p, signal.SIGTERM) for p in b & children(process.pid)],
                "the workers are new",
            )  # fmt: skip
            wait_for(lambda: len(children(process.pid)) == 3, "all are there")
        assert stats(service)["seven"]["value"] == 7
    wait_for(service.nothing_left, "nothing is left")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_an_aggregator_of_root_belongs_to_the_workers_user(short_dir, preload):
    """If root's gunicorn has a user for its workers, the aggregator and its files belong to that user."""
    service = Service(
        short_dir, ["-w", "2", "--user", "nobody", "--group", "nogroup", "--log-level", "warning", *preload]
    )
    python, path = python_for_any_user("flask", "gunicorn", "zmq")
    service.command[:1] = [python, "-m", "gunicorn"]
    service.environment["PYTHONPATH"] = path
    for directory in (short_dir, service.private):
        directory.chmod(0o777)
    readable = short_dir / "app"
    shutil.copytree(EXAMPLES, readable)
    readable.chmod(0o755)
    service.command[service.command.index("--chdir") + 1] = str(readable)
    with service.running() as process:
        service.wait_until_up()
        for _ in range(10):
            get(service.port, GONE)
        wait_for(lambda: gone_requests(service.port) == 10, "all is counted")
        nobody = os.stat(f"/proc/{min(children(process.pid))}").st_uid
        assert nobody != 0
        (aggregator,) = (p for p in mentions(str(service.private)) if p not in session(process.pid))
        assert os.stat(f"/proc/{aggregator}").st_uid == nobody
        (directory,) = service.private.glob("tapes-*")
        assert {path.stat().st_uid for path in [directory, *directory.iterdir()]} == {nobody}
        before = children(process.pid)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: not before & children(process.pid), "the workers are new")
        wait_for(lambda: gone_requests(service.port) == 10, "still counted")
        for pid in [*session(process.pid), aggregator]:
            signal_to(pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: has_ended(aggregator), "the aggregator is dead")
        assert directory.exists()
    with service.running() as process:
        service.wait_until_up()
        assert not directory.exists()
        assert gone_requests(service.port) == 0
        process.terminate()
        process.wait(10)
    wait_for(service.nothing_left, "nothing is left")


HOOKS = """
from tapes.contrib.gunicorn_conf import *

@with_tapes
def on_starting(server):
    server.log.warning("mine: on_starting")

@with_tapes
def post_fork(server, worker):
    import tapes
    tapes.counter("forked").increment()
    server.log.warning("mine: post_fork")

@with_tapes
def worker_exit(server, worker):
    import tapes
    tapes.counter("left").increment()

@with_tapes
def on_exit(server):
    server.log.warning("mine: on_exit")
"""


def test_with_tapes_combines_hooks_with_those_of_tapes(short_dir):
    """Hooks under ``with_tapes`` run beside those of tapes, and what they record is counted."""
    (short_dir / "conf.py").write_text(HOOKS)
    service = Service(short_dir, ["-w", "2", "--log-level", "warning"])
    service.command[service.command.index("-c") + 1] = str(short_dir / "conf.py")
    with service.running() as process:
        service.wait_until_up()
        before = children(process.pid)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: not before & children(process.pid), "the workers are new")
        wait_for(lambda: stats(service).get("left", {}).get("value") == 2, "both have left")
        wait_for(lambda: stats(service)["forked"]["value"] == 4, "four have come")
        process.terminate()
        assert process.wait(10) == 0
    assert service.output().count("mine: on_starting") == 1
    assert service.output().count("mine: on_exit") == 1
    wait_for(service.nothing_left, "nothing is left")


def test_with_tapes_refuses_a_hook_that_tapes_does_not_have():
    """``with_tapes`` on a hook that tapes does not have raises an error that lists those it has."""
    code = "from tapes.contrib.gunicorn_conf import with_tapes\n@with_tapes\ndef pre_fork(s, w): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(
        "got 'pre_fork', expected a hook named on_exit, on_starting, post_fork, worker_exit", done.stderr
    )


def test_gevent_workers_count_exactly_and_wait_for_no_aggregator(short_dir):
    """Patched gevent workers count exactly, and no request waits while the aggregator is stopped."""
    service = Service(short_dir, ["-w", "2", "-k", "gevent", "--log-level", "warning"])
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, GONE, clients=8) as load:
            load.wait_for_requests(2000)
            before = children(process.pid)
            process.send_signal(signal.SIGHUP)
            load.wait_for_requests(1000)
        wait_for(lambda: all(map(has_ended, before)), "the old workers have ended")
        wait_for(lambda: gone_requests(service.port) == load.answered, f"{load.answered} are counted")
        (aggregator,) = (p for p in mentions(str(service.private)) if p not in session(process.pid))
        signal_to(aggregator, signal.SIGSTOP)
        try:
            with Load(service.port, "/metrics", clients=4) as reads, Load(service.port, GONE) as load2:
                load2.wait_for_requests(500)
            assert reads.answered == reads.sent
        finally:
            signal_to(aggregator, signal.SIGCONT)
        both = load.answered + load2.answered
        wait_for(lambda: gone_requests(service.port) == both, f"{both} are counted")
        assert counts(service.port)
    wait_for(service.nothing_left, "nothing is left")
