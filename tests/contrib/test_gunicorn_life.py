"""gunicorn's workers come and go in every way that it knows; each answered request counts once."""

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

from tests.contrib.services import Load, Service, counts, gone, has_ended, session, signal_to
from tests.processes import EXAMPLES, children, get, mentions, python_for_everybody, wait_for

GONE = "/old-catalogue"


def stats(service):
    return json.loads(get(service.port, "/metrics")[2])


@pytest.mark.timeout(300)
def test_workers_that_are_recycled_after_150_requests(short_dir):
    """20,000 requests, about 130 workers: exact, and nothing of them is left."""
    if shutil.which("ab") is None:
        pytest.skip("not installed: ab")
    service = Service(short_dir, ["-w", "2", "--max-requests", "150", "--log-level", "warning"])
    with service.running():
        service.wait_until_up()
        url = f"http://127.0.0.1:{service.port}{GONE}"
        subprocess.run(["ab", "-q", "-n", "20000", "-c", "8", url], capture_output=True, check=True)
        wait_for(lambda: gone(service.port) == 20_000, "all is counted")
        retired = stats(service)["tapes"]["workers"]['{state="retired"}']["value"]
        assert retired >= 20_000 // 150 - 2
        assert stats(service)["http"]["server"]["active_requests"]["value"] == 0
    wait_for(service.nothing_left, "nothing is left", 4)


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_a_reload_under_load(short_dir, preload):
    """HUP, three times: new workers come before the old ones leave."""
    service = Service(short_dir, ["-w", "2", "--log-level", "warning", *preload])
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, GONE) as load:
            for _ in range(3):
                load.go_on()
                before = children(process.pid)
                process.send_signal(signal.SIGHUP)
                wait_for(lambda b=before: not b & children(process.pid), "the workers are new")
            load.go_on()
        assert load.answered == load.sent
        wait_for(lambda: gone(service.port) == load.answered, f"{load.answered} are counted")
        process.terminate()
        process.wait(10)
    wait_for(service.nothing_left, "nothing is left", 4)


def test_an_upgrade_under_load(short_dir):
    """USR2, then TERM to the old master: the new one goes on with the same aggregator and its counts."""
    pidfile = short_dir / "pid"
    service = Service(short_dir, ["-w", "2", "--log-level", "warning", "--pid", str(pidfile)])
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, GONE) as load:
            load.go_on()
            process.send_signal(signal.SIGUSR2)
            wait_for(lambda: (short_dir / "pid.2").exists(), "the new master starts")
            master = int((short_dir / "pid.2").read_text())
            wait_for(lambda: len(children(master)) == 2, "it has workers")
            load.go_on()
            process.terminate()
            process.wait(20)
            load.go_on()
        assert load.answered == load.sent
        wait_for(lambda: gone(service.port) == load.answered, f"{load.answered} are counted")
        assert len(list(service.private.glob("tapes-*"))) == 1
        os.kill(master, signal.SIGTERM)
        wait_for(service.nothing_left, "nothing is left", 6)


@pytest.mark.alone
def test_a_worker_that_is_killed_under_load(short_dir):
    """kill -9 takes what that worker answered in its last interval at most; the others lose nothing."""
    service = Service(short_dir, ["-w", "3", "--log-level", "warning"])
    with service.running() as process:
        service.wait_until_up()
        kills = []
        with Load(service.port, GONE) as load:
            for _ in range(3):
                load.go_on()
                victim = min(children(process.pid))
                kills.append(time.monotonic())
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda v=victim: v not in children(process.pid), "another one comes")
            load.go_on()
        wait_for(lambda: stats(service)["tapes"]["workers"]['{state="live"}']["value"] == 3, "all are there")
        late = sum(kill - 0.2 < answered < kill + 0.05 for kill in kills for answered in load.times)
        wait_for(lambda: gone(service.port) >= load.answered - late, f"no more than {late} are lost")
        assert gone(service.port) <= load.sent
    wait_for(service.nothing_left, "nothing is left", 4)


def test_a_worker_that_is_too_slow(short_dir):
    """gunicorn aborts it; what it counted until then is not lost."""
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
    wait_for(service.nothing_left, "nothing is left", 4)


def test_workers_that_fail_to_boot(short_dir):
    """gunicorn gives up, and the aggregator with it."""
    (short_dir / "broken.py").write_text("raise RuntimeError('no application here')\n")
    service = Service(short_dir, ["-w", "2", "--log-level", "critical"])
    service.command[-1] = "broken:app"
    service.command[service.command.index("--chdir") + 1] = str(short_dir)
    with service.running() as process:
        assert process.wait(20) != 0
        wait_for(service.nothing_left, "nothing is left", 4)


def test_what_was_counted_while_the_application_was_preloaded(short_dir):
    """Seven at import, once in the sum of three workers; again after they were all replaced."""
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
            # One that is just being born does not mind the first TERM.
            wait_for(
                lambda b=before: not [signal_to(p, signal.SIGTERM) for p in b & children(process.pid)],
                "the workers are new",
            )  # fmt: skip
            wait_for(lambda: len(children(process.pid)) == 3, "all are there")
        assert stats(service)["seven"]["value"] == 7
    wait_for(service.nothing_left, "nothing is left", 4)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_root_that_drops_its_privileges(short_dir, preload):
    """The aggregator and all that it makes belong to the workers' user; as before, nothing is left."""
    service = Service(
        short_dir, ["-w", "2", "--user", "nobody", "--group", "nogroup", "--log-level", "warning", *preload]
    )
    python, path = python_for_everybody("flask", "gunicorn", "zmq")
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
        wait_for(lambda: gone(service.port) == 10, "all is counted")
        nobody = os.stat(f"/proc/{min(children(process.pid))}").st_uid
        assert nobody != 0
        (aggregator,) = (p for p in mentions(str(service.private)) if p not in session(process.pid))
        assert os.stat(f"/proc/{aggregator}").st_uid == nobody
        (directory,) = service.private.glob("tapes-*")
        assert {path.stat().st_uid for path in [directory, *directory.iterdir()]} == {nobody}
        before = children(process.pid)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: not before & children(process.pid), "the workers are new")
        wait_for(lambda: gone(service.port) == 10, "still counted")
        for pid in [*session(process.pid), aggregator]:
            signal_to(pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: has_ended(aggregator), "the aggregator is dead")
        assert directory.exists()
    with service.running() as process:
        service.wait_until_up()
        assert not directory.exists()
        assert gone(service.port) == 0
        process.terminate()
        process.wait(10)
    wait_for(service.nothing_left, "nothing is left", 4)


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


def test_hooks_of_ones_own_go_beside_ours(short_dir):
    """with_tapes: what they record counts, at the very end too."""
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
    wait_for(service.nothing_left, "nothing is left", 4)


def test_a_hook_that_tapes_has_none_of():
    """A slip is told when the configuration is read."""
    code = "from tapes.contrib.gunicorn_conf import with_tapes\n@with_tapes\ndef pre_fork(s, w): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(
        "got 'pre_fork', expected a hook named on_exit, on_starting, post_fork, worker_exit", done.stderr
    )


def test_gevent_workers(short_dir):
    """Monkey patched, with many greenlets at once: exact, and no request waits for the aggregator."""
    service = Service(short_dir, ["-w", "2", "-k", "gevent", "--log-level", "warning"])
    with service.running() as process:
        service.wait_until_up()
        with Load(service.port, GONE, clients=8) as load:
            load.go_on(2000)
            before = children(process.pid)
            process.send_signal(signal.SIGHUP)
            load.go_on(1000)
        wait_for(lambda: all(map(has_ended, before)), "the old workers have ended")
        wait_for(lambda: gone(service.port) == load.answered, f"{load.answered} are counted")
        (aggregator,) = (p for p in mentions(str(service.private)) if p not in session(process.pid))
        signal_to(aggregator, signal.SIGSTOP)
        try:
            with Load(service.port, "/metrics", clients=4) as reads, Load(service.port, GONE) as load2:
                load2.go_on(500)
            assert reads.answered == reads.sent
        finally:
            signal_to(aggregator, signal.SIGCONT)
        both = load.answered + load2.answered
        wait_for(lambda: gone(service.port) == both, f"{both} are counted")
        assert counts(service.port)
    wait_for(service.nothing_left, "nothing is left", 4)
