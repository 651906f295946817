"""The adapter's one line and nothing else, under every server: exact counts from all workers, nothing left.

The applications are the examples, the servers and their reloads are real.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.contrib.services import aggregator_in_use, counts, has_ended, session, signal_to, timed
from tests.processes import EXAMPLES, Home, free_port, get, mentions, wait_for

BIN = pathlib.Path(sys.executable).parent
GUNICORN = "gunicorn -w 2 -b 127.0.0.1:{port} --log-level warning --graceful-timeout 5"
UWSGI = (
    "uwsgi --http-socket 127.0.0.1:{port} --master --processes 2 --die-on-term --disable-logging "
    "--virtualenv {prefix} --worker-reload-mercy 5 --module flask_app:app"
)
GRANIAN = "granian --workers 2 --port {port} --log-level warning"
SERVERS = {
    "gunicorn sync": f"{GUNICORN} flask_app:app",
    "gunicorn gthread": f"{GUNICORN} -k gthread --threads 4 flask_app:app",
    "gunicorn gevent": f"{GUNICORN} -k gevent flask_app:app",
    "gunicorn tornado": f"{GUNICORN} -k tornado flask_app:app",
    "gunicorn preload": f"{GUNICORN} --preload wsgi_app:app",
    "gunicorn uvicorn": f"{GUNICORN} -k uvicorn_worker.UvicornWorker starlette_app:app",
    "uwsgi": UWSGI,
    "uwsgi threads": f"{UWSGI} --enable-threads --threads 2",
    "uwsgi lazy": f"{UWSGI} --lazy-apps",
    "uwsgi lazy threads": f"{UWSGI} --lazy-apps --enable-threads",
    "uvicorn": "uvicorn --workers 2 --port {port} --log-level warning fastapi_app:app",
    "hypercorn": "hypercorn -w 2 -b 127.0.0.1:{port} --log-level warning starlette_app:app",
    "hypercorn trio": "hypercorn -k trio -w 2 -b 127.0.0.1:{port} --log-level warning asgi_app:app",
    "granian asgi": f"{GRANIAN} --interface asgi starlette_app:app",
    "granian wsgi": f"{GRANIAN} --interface wsgi flask_app:app",
    "django": f"{GUNICORN} django_app:app",
    "litestar": "uvicorn --workers 2 --port {port} --log-level warning litestar_app:app",
    "tornado": "python {examples}/tornado_app.py {port} 2",
    "gunicorn tornado application": f"{GUNICORN} -k tornado tornado_app:app",
    "uvicorn without lifespan": "uvicorn --workers 2 --port {port} --log-level warning asgi_app:app",
    "tapes run": "tapes run -- {bin}/uvicorn --workers 2 --port {port} --log-level warning asgi_app:app",
    "granian without lifespan": f"{GRANIAN} --interface asgi asgi_app:app",
}
KILL_THEIR_WORKERS = {
    "uwsgi": "runs no hook in a worker that it ends while it is busy, as it is for a moment after an answer",
    "hypercorn": "at SIGTERM, when the first worker has exited, kills the others by SIGTERM",
}
ROUTES = {
    "fastapi_app": "/hello/{name}", "starlette_app": "/hello/{name}", "litestar_app": "/hello/{name}",
    "tornado_app": r"/hello/(\w+)",
}  # fmt: skip


@pytest.fixture(scope="module")
def check_later():
    """Return a function that checks, while later tests run, that nothing of a service is left."""
    with ThreadPoolExecutor(8) as pool:
        checks = []
        yield lambda home, what: checks.append(pool.submit(assert_nothing_left, home, what))
        for check in checks:
            check.result()


def assert_nothing_left(home, what):
    """Fail unless all processes and files of the service are gone in time."""
    wait_for(home.nothing_left, f"nothing is left of {what}", every=0.1)
    shutil.rmtree(home.directory)


@pytest.fixture
def home(check_later, request):
    """The directories of a server; in the end nothing of tapes is left of it."""
    home = Home(pathlib.Path(tempfile.mkdtemp(prefix="t", dir="/tmp")))
    home.environment["PYTHONPATH"] = str(EXAMPLES)
    yield home
    check_later(home, request.node.name)


def load(port: int, path: str, number: int) -> None:
    """Send exactly ``number`` requests by ab."""
    url = f"http://127.0.0.1:{port}{path}"
    done = subprocess.run(
        ["ab", "-q", "-n", str(number), "-c", "8", url], capture_output=True, text=True, check=True
    )
    assert f"Complete requests:      {number}\n" in done.stdout


def workers(port: int) -> set[str]:
    """Wait until two workers have answered, and return their pids."""
    seen: set[bytes] = set()
    wait_for(lambda: seen.add(get(port, "/worker")[2]) or len(seen) == 2, "both workers answer")
    return {pid.decode().strip() for pid in seen}


def kills_its_workers(server: str) -> bool:
    """Return whether a server kills workers before their exit hooks have run."""
    return SERVERS[server].split()[0] in KILL_THEIR_WORKERS


def command(line: str, port: int) -> list[str]:
    """Return the arguments of a line from one of the tables above."""
    name, *arguments = line.format(port=port, prefix=sys.prefix, examples=EXAMPLES, bin=BIN).split()
    return [str(BIN / name), *arguments]


@pytest.mark.needs("ab")
@pytest.mark.parametrize("server", SERVERS)
def test_one_line_makes_all_workers_show_exact_counts(home, server):
    """With the one line every worker shows the exact counts, after a graceful reload and at the end too."""
    port, http = free_port(), free_port()
    route = next(
        (ROUTES[application] for application in ROUTES if application in SERVERS[server]), "/hello/<name>"
    )
    with home.running(command(SERVERS[server], port), TAPES_HTTP=str(http)) as process:
        wait_for(lambda: get(port, "/worker"), "the server is up")
        before = workers(port)
        load(port, "/hello/bob", 600)
        load(port, "/nothing/here", 200)
        expected = {("GET", route, "200"): 600, ("GET", "<unmatched>", "404"): 200}
        wait_for(lambda: counts(port) == expected, f"it is counted: {expected}")
        assert [counts(port) for _ in range(16)] == [expected] * 16

        if server != "tornado":  # it has no reload
            process.send_signal(signal.SIGHUP)
            # New workers answer earlier; but an old one that is about to exit resets its connections.
            wait_for(lambda: all(has_ended(int(pid)) for pid in before), "the old workers have ended")
            assert not workers(port) & before
            wait_for(lambda: counts(port) == expected, "nothing was lost")
            assert [counts(port) for _ in range(16)] == [expected] * 16
        load(port, "/hello/bob", 200)
        expected["GET", route, "200"] += 200
        wait_for(lambda: counts(port) == expected, f"it is counted: {expected}")
        assert [counts(port) for _ in range(16)] == [expected] * 16

        for _ in range(20):
            assert get(port, "/hello/bob")[0] == 200
        if server == "tornado":  # the signal ends only the parent, so its children get their own
            process.terminate()
            process.wait(15)
            for pid in before:
                signal_to(int(pid), signal.SIGTERM)
            return
        with aggregator_in_use(home):
            process.terminate()
            process.wait(15)
            if not kills_its_workers(server):
                expected["GET", route, "200"] += 20
                wait_for(lambda: counts(http) == expected, "the aggregator, which stays on, has it all")


SLOWLY = """
import importlib, os
import tapes.distributed.worker.publisher
tapes.distributed.worker.publisher.INTERVAL_SECONDS = 60.0
app = importlib.import_module(os.environ["APPLICATION"]).app
"""
# Tornado's processes have to be ended one by one.
LEAVING = [server for server in SERVERS if server != "tornado" and not kills_its_workers(server)]


@pytest.mark.parametrize("server", LEAVING)
def test_workers_publish_their_last_values_at_their_exit(home, server):
    """Workers that exit at SIGTERM publish counts that they had not published before."""
    port, http = free_port(), free_port()
    *line, application = command(SERVERS[server], port)
    (home.directory / "slowly.py").write_text(SLOWLY)
    home.environment["PYTHONPATH"] += f":{home.directory}"
    environment = {"TAPES_HTTP": str(http), "APPLICATION": application.removesuffix(":app")}
    with home.running([*line, "slowly:app"], **environment) as process:
        wait_for(lambda: get(port, "/worker"), "the server is up")
        workers(port)
        for _ in range(50):
            assert get(port, "/hello/bob")[0] == 200
        with aggregator_in_use(home):
            process.terminate()
            process.wait(15)
            wait_for(lambda: sum(counts(http).values()) == 50, "the aggregator, which stays on, has it all")


DEVELOPMENT = {
    "flask": "flask --app flask_app run --port {port}",
    "flask reloading": "flask --app flask_app run --debug --port {port}",
    "uvicorn": "uvicorn --port {port} starlette_app:app",
    "uvicorn reloading": "uvicorn --reload --reload-dir . --port {port} starlette_app:app",
    "hypercorn": "hypercorn -b 127.0.0.1:{port} starlette_app:app",
    "hypercorn reloading": "hypercorn --reload -b 127.0.0.1:{port} starlette_app:app",
    "wsgiref": "python serve.py {port}",
    "tornado": "python {examples}/tornado_app.py {port} 1",
}
WSGIREF = """
import sys
from wsgiref.simple_server import make_server
from wsgi_app import app
make_server("127.0.0.1", int(sys.argv[1]), app).serve_forever()
"""


@pytest.mark.parametrize("server", DEVELOPMENT)
def test_a_development_server_starts_no_aggregator(home, server):
    """A server of one process answers for itself: it starts no aggregator and makes no file."""
    port = free_port()
    (home.directory / "serve.py").write_text(WSGIREF)
    with home.running(command(DEVELOPMENT[server], port)) as process:
        wait_for(lambda: get(port, "/worker"), "the server is up")
        load(port, "/hello/bob", 50)
        wait_for(lambda: sum(counts(port).values()) == 50, "it answers for itself")
        assert not list(home.private.iterdir())
        process.terminate()
        process.wait(10)


CANNOT_JOIN = {
    "it may not start one": ({"TAPES_AUTOSTART": "0"}, b"set TAPES_ADDR"),
    "no pyzmq": ({"PYTHONPATH": "."}, b"pip install 'tapes[distributed]'"),
    "a bad address": ({"TAPES_ADDR": "here"}, b"ipc://PATH"),
}


@pytest.mark.parametrize("server", ["gunicorn sync", "uvicorn"])
@pytest.mark.parametrize("case", CANNOT_JOIN)
def test_a_worker_that_cannot_join_answers_metrics_by_a_503(home, server, case):
    """A worker that can't join answers ``/metrics`` by 503 and what to do; the application works."""
    environment, words = CANNOT_JOIN[case]
    if case == "no pyzmq":
        (home.directory / "zmq.py").write_text("raise ModuleNotFoundError('zmq')\n")
        environment = {"PYTHONPATH": f"{home.directory}:{EXAMPLES}"}
    port = free_port()
    home.environment.update(environment)
    with home.running(command(SERVERS[server], port)):
        wait_for(lambda: get(port, "/worker"), "the server is up")
        for _ in range(4):
            status, headers, text = get(port, "/metrics")
            assert (status, headers["Content-Type"]) == (503, "text/plain; charset=utf-8")
            assert words in text
            assert get(port, "/hello/bob")[0] == 200


@pytest.mark.alone
@pytest.mark.parametrize("server", ["gunicorn gthread", "uvicorn", "uwsgi threads"])
def test_a_stopped_aggregator_makes_metrics_a_503_in_time(home, server):
    """While the aggregator is stopped, ``/metrics`` is a 503 within 1.5 s and other requests are answered."""
    port = free_port()
    with home.running(command(SERVERS[server], port)) as process:
        wait_for(lambda: get(port, "/worker"), "the server is up")
        workers(port)

        def joined():
            live = json.loads(get(port, "/metrics")[2])["tapes"]["workers"]['{state="live"}']["value"]
            return live == 2

        wait_for(joined, "all have joined")
        (aggregator,) = (p for p in mentions(str(home.private)) if p not in session(process.pid))
        signal_to(aggregator, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(1) as pool:
                answered = 0
                reader = pool.submit(timed, get, port, "/metrics")
                while not reader.done():
                    assert get(port, "/hello/bob")[0] == 200
                    answered += 1
                (status, headers, text), seconds = reader.result()
                # The best of three, as the machine may be busy. The limit is one timeout, not two.
                assert min(seconds, *(timed(get, port, "/metrics")[1] for _ in range(2))) < 1.5
            assert (status, headers["Content-Type"]) == (503, "text/plain; charset=utf-8")
            assert b"did not answer" in text
            assert answered > 10  # the application did not wait
        finally:
            signal_to(aggregator, signal.SIGCONT)
        wait_for(lambda: get(port, "/metrics")[0] == 200, "it answers again")
        process.terminate()
        process.wait(15)


def test_the_tasks_of_celery_are_counted(home):
    """Each of 100 tasks in celery's recycled pool processes is counted by the aggregator's HTTP port."""
    http, mailbox = free_port(), home.directory / "mail"
    mailbox.mkdir()
    home.environment["MAILBOX"] = str(mailbox)
    # The tasks are sent before the worker starts, because kombu reads files that are half written.
    source = "import celery_app; [celery_app.send.delay(n) for n in range(100)]"
    assert home.run([sys.executable, "-c", source])[0] == 0
    celery = "celery -A celery_app worker --concurrency 2 --loglevel WARNING --max-tasks-per-child 20"
    with home.running(command(celery, 0), TAPES_HTTP=str(http)) as process:

        def sent():
            return json.loads(get(http, "/metrics")[2]).get("mails", {}).get("sent", {}).get("count")

        wait_for(lambda: sent() == 100, "100 tasks are counted", 30)
        process.terminate()
        process.wait(15)
    wait_for(lambda: not list(mailbox.glob("*.msg")), "all tasks are done")
