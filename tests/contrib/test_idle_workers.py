"""A worker counts from its start: it is in every answer before it has served a request."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys

import pytest

from tests.processes import Home, children, free_port, get, wait_for

BIN = pathlib.Path(sys.executable).parent
WORKERS = 3

RECORD = """
import os, threading, time, tapes

def work():
    alive = tapes.gauge("alive")
    alive.set(1)
    while True:
        tapes.counter("ticks", worker=os.getpid()).increment()
        time.sleep(0.05)

def start():
    threading.Thread(target=work, daemon=True).start()
"""
APPLICATIONS = {
    "wsgi_idle": f"""{RECORD}
import flask
from tapes.contrib.flask import Tapes
app = flask.Flask("idle")
Tapes(app)
start()
""",
    "preloaded": f"""{RECORD}
import flask
from tapes.contrib.flask import Tapes
app = flask.Flask("idle")
Tapes(app)
os.register_at_fork(after_in_child=start)
""",
    "postforked": f"""{RECORD}
import flask, uwsgidecorators
from tapes.contrib.flask import Tapes
app = flask.Flask("idle")
Tapes(app)
uwsgidecorators.postfork(start)
""",
    "asgi_idle": f"""{RECORD}
from starlette.applications import Starlette
from tapes.contrib.asgi import TapesMiddleware
app = TapesMiddleware(Starlette())
start()
""",
    "tornado_idle": f"""{RECORD}
import sys, tornado
from tornado import httpserver, ioloop, netutil, process, web
from tapes.contrib.tornado import instrument
if sys.argv[3] == "before":
    application = instrument(web.Application([]))
sockets = netutil.bind_sockets(int(sys.argv[1]), "127.0.0.1")
process.fork_processes(int(sys.argv[2]))
if sys.argv[3] == "after":
    application = instrument(web.Application([]))
start()
server = httpserver.HTTPServer(application)
server.add_sockets(sockets)
ioloop.IOLoop.current().start()
""",
}
GUNICORN = "gunicorn -w {workers} -b 127.0.0.1:{port} --log-level warning"
UWSGI = (
    "uwsgi --http-socket 127.0.0.1:{port} --master --processes {workers} --die-on-term --disable-logging "
    "--virtualenv {prefix}"
)
SERVERS = {
    "gunicorn sync": f"{GUNICORN} wsgi_idle:app",
    "gunicorn gthread": f"{GUNICORN} -k gthread --threads 4 wsgi_idle:app",
    "gunicorn preload": f"{GUNICORN} --preload preloaded:app",
    "gunicorn preload gthread": f"{GUNICORN} --preload -k gthread --threads 2 preloaded:app",
    "gunicorn with the hooks": f"{GUNICORN} -c python:tapes.contrib.gunicorn_conf wsgi_idle:app",
    "gunicorn preload, hooks": f"{GUNICORN} --preload -c python:tapes.contrib.gunicorn_conf preloaded:app",
    "uwsgi": f"{UWSGI} --enable-threads --module postforked:app",
    "uwsgi threads": f"{UWSGI} --enable-threads --threads 2 --module postforked:app",
    "uwsgi lazy": f"{UWSGI} --lazy-apps --enable-threads --module wsgi_idle:app",
    "uvicorn": "uvicorn --workers {workers} --port {port} --log-level warning asgi_idle:app",
    "hypercorn": "hypercorn -w {workers} -b 127.0.0.1:{port} --log-level warning asgi_idle:app",
    "granian": "granian --workers {workers} --port {port} --log-level warning --interface asgi "
    "asgi_idle:app",
    "tornado": "python tornado_idle.py {port} {workers} after",
    "tornado, instrumented before the fork": "python tornado_idle.py {port} {workers} before",
}  # fmt: skip


def start(home: Home, line: str, **environment: str):
    """Run a server in a directory with the applications."""
    for name, text in {**APPLICATIONS, **JOINED_APPLICATIONS, **MASTER_APPLICATIONS}.items():
        (home.directory / f"{name}.py").write_text(text)
    name, *arguments = line.format(port=free_port(), prefix=sys.prefix, workers=WORKERS).split()
    return home.running([str(BIN / name), *arguments], PYTHONPATH=str(home.directory), **environment)


def answer(port: int) -> tuple[int, int, int]:
    """Return how many workers run, have set their gauge, and have counted."""
    stats = json.loads(get(port, "/metrics")[2])
    live = stats["tapes"]["workers"]['{state="live"}']["value"]
    return live, stats.get("alive", {}).get("value", 0), len(stats.get("ticks", {}))


@pytest.mark.parametrize("server", SERVERS)
def test_workers_without_requests_are_counted(home, server):
    """Workers that have served no request are in the answers of TAPES_HTTP, with gauges and counts."""
    http = free_port()
    with start(home, SERVERS[server], TAPES_HTTP=str(http)):
        wait_for(lambda: answer(http) == (WORKERS, WORKERS, WORKERS), "every worker is counted")


def test_uwsgi_workers_without_threads_are_known_from_their_start(home):
    """uWSGI workers without Python threads are known from their start, with what they have set by then."""
    http = free_port()
    with start(home, f"{UWSGI} --module postforked:app", TAPES_HTTP=str(http)):
        wait_for(lambda: answer(http)[0] == WORKERS, "every worker is known")


JOINED = {
    "gunicorn": (f"{GUNICORN} --preload joined:app", {}),
    "tornado": ("python tornado_joined.py {port} {workers} before", {"JOIN": "1"}),
    "tapes run": ("tapes run -- {prefix}/bin/python tornado_joined.py {port} {workers} before", {}),
}
JOINED_APPLICATIONS = {
    "joined": """
import flask, tapes
from tapes.contrib.flask import Tapes
tapes.join()
app = flask.Flask("idle")
Tapes(app)
""",
    "tornado_joined": "import os, tapes\nif 'JOIN' in os.environ: tapes.join()\n"
    + APPLICATIONS["tornado_idle"].replace("\nstart()\n", "\n"),
}


@pytest.mark.parametrize("server", JOINED)
def test_workers_of_a_joined_master_are_known_from_their_start(home, server):
    """Workers of a master that called join() count from their start, though they record nothing."""
    http = free_port()
    line, environment = JOINED[server]
    with start(home, line, TAPES_HTTP=str(http), **environment):
        wait_for(lambda: answer(http)[0] == WORKERS + 1, "every worker is counted")


MASTERS = {
    "gunicorn": f"{GUNICORN} --preload master_records:app",
    "gunicorn, own registry": f"{GUNICORN} --preload master_owns:app",
    "gunicorn, own address": f"{GUNICORN} --preload master_has_address:app",
    "tornado": "python tornado_master.py {port} {workers} before",
    "gunicorn, a hook": f"{GUNICORN} -c master_hooks.py wsgi_idle:app",
}  # fmt: skip
RECORD_IN_MASTER = """
import flask, os, threading, time, tapes
from tapes.contrib.flask import Tapes
registry = tapes.default_registry

def work():
    for _ in range(100):
        registry.counter("in_master").increment()
        time.sleep(0.02)
    registry.counter("in_master", when="done").increment()
"""
MASTER_APPLICATIONS = {
    "master_records": f"""{RECORD_IN_MASTER}
app = flask.Flask("idle")
Tapes(app)
threading.Thread(target=work, daemon=True).start()
""",
    "master_owns": f"""{RECORD_IN_MASTER}
registry = tapes.Registry()
app = flask.Flask("idle")
Tapes(app, registry=registry)
threading.Thread(target=work, daemon=True).start()
""",
    "master_has_address": f"""{RECORD_IN_MASTER}
registry = tapes.DistributedRegistry(f"ipc://{{os.getcwd()}}/own.ipc")
app = flask.Flask("idle")
Tapes(app, registry=registry)
threading.Thread(target=work, daemon=True).start()
""",
    "only_before": """
import flask, tapes
from tapes.contrib.flask import Tapes
app = flask.Flask("idle")
Tapes(app)
tapes.counter("before").increment(3)
""",
    "tornado_master": APPLICATIONS["tornado_idle"].replace(
        "sockets =", f"{RECORD_IN_MASTER}\nthreading.Thread(target=work, daemon=True).start()\nsockets ="
    ).replace("\nstart()\n", "\n"),
    "master_hooks": """
from tapes.contrib.gunicorn_conf import *
import tapes
_forked = []
def pre_fork(server, worker):
    _forked.append(worker)
    if len(_forked) == 2:
        tapes.counter("in_master").increment(100)
        tapes.counter("in_master", when="done").increment()
""",
}  # fmt: skip


@pytest.mark.parametrize("server", [server for server in MASTERS if "gunicorn" in server])
def test_a_replacement_worker_of_a_connected_master_counts_from_its_start(home, server):
    """A worker that replaces a terminated one counts from its start, without a request."""
    http = free_port()
    with start(home, MASTERS[server], TAPES_HTTP=str(http)) as process:

        def pids():
            return set(children(process.pid))

        wait_for(lambda: answer(http)[0] == WORKERS + 1, "the master is connected too")
        before = pids()
        for pid in before:
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: len(pids()) == WORKERS and not pids() & before, "others have taken their places")
        wait_for(lambda: answer(http)[0] == WORKERS + 1, "they are counted")


@pytest.mark.parametrize("server", MASTERS)
def test_events_recorded_in_the_master_count(home, server):
    """Events that the master's threads and hooks record are counted, after the last fork too."""
    http = free_port()
    with start(home, MASTERS[server], TAPES_HTTP=str(http)):

        def counts():
            series = json.loads(get(http, "/metrics")[2]).get("in_master", {})
            return series.get("value"), series.get('{when="done"}', {}).get("value")

        wait_for(lambda: counts() == (100, 1), "everything is counted")


@pytest.mark.parametrize(("application", "warnings"), [("master_records", 1), ("only_before", 0)])
def test_values_that_uwsgis_master_loses_are_logged_once(home, application, warnings):
    """uWSGI's master can't connect: events that it records after the fork are lost and logged once."""
    log, http = home.directory / "log", free_port()
    line = f"{UWSGI} --enable-threads --logto {log} --module {application}:app"

    def logged():
        return log.read_text().count("what uWSGI's master records is not counted")

    with start(home, line, TAPES_HTTP=str(http)):
        wait_for(lambda: answer(http)[0] == WORKERS, "every worker is counted")
        wait_for(lambda: logged() == warnings, "the log")
        if not warnings:
            assert json.loads(get(http, "/metrics")[2])["before"]["value"] == 3
    assert logged() == warnings


DEVELOPMENT = {
    "flask": "flask --app wsgi_idle run --port {port}",
    "uvicorn": "uvicorn --port {port} --log-level warning asgi_idle:app",
    "uvicorn reload": "uvicorn --reload --port {port} --log-level warning asgi_idle:app",
}


@pytest.mark.parametrize("server", DEVELOPMENT)
def test_a_server_of_one_process_starts_no_aggregator(home, server):
    """A development server answers for itself: no aggregator, no directory and no listener is started."""
    http = free_port()
    line = DEVELOPMENT[server].replace("{port}", str(port := free_port()))
    with start(home, line, TAPES_HTTP=str(http)):
        wait_for(lambda: b"ticks" in get(port, "/metrics")[2], "it answers for itself")
        assert not home.services()
        with pytest.raises(ConnectionRefusedError):
            get(http, "/metrics")
