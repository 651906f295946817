"""The adapter's one line and nothing else, under every server: exact, the same from all workers, no trace.

The applications are the examples; the servers are real, and so are their reloads.
"""

from __future__ import annotations

import contextlib
import http.client
import pathlib
import signal
import subprocess
import sys

import pytest

from tests.contrib.services import counts
from tests.processes import EXAMPLES, Home, answers, free_port, get, wait_for

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
}
ROUTES = {"flask_app": "/hello/<name>", "wsgi_app": "/hello/<name>", "asgi_app": "/hello/<name>"}


@pytest.fixture
def home(short_dir):
    """Where a server runs; nothing of tapes is left of it within 4 s."""
    home = Home(short_dir)
    home.environment["PYTHONPATH"] = str(EXAMPLES)
    yield home
    wait_for(home.nothing_left, "nothing is left", 4)


def load(port: int, path: str, number: int) -> None:
    """Send so many requests, no more and no less, by ab."""
    url = f"http://127.0.0.1:{port}{path}"
    done = subprocess.run(
        ["ab", "-q", "-n", str(number), "-c", "8", url], capture_output=True, text=True, check=True
    )
    assert f"Complete requests:      {number}\n" in done.stdout


def counted(port: int) -> dict[tuple[str, str, str], int]:
    """What a worker says; nothing if none could be asked just now."""
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        return counts(port)
    return {}


def worker(port: int) -> str:
    """Who answers; nobody if none does just now."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port, "/worker")[2].decode().strip()
    return ""


def workers(port: int) -> set[str]:
    """Wait until two have answered, and return who they are."""
    seen: set[str] = set()
    wait_for(lambda: seen.add(worker(port)) or len(seen - {""}) == 2, "both workers answer", 20)
    return seen - {""}


@pytest.mark.needs("ab")
@pytest.mark.parametrize("server", SERVERS)
def test_one_line_is_enough(home, server):
    """Requests by ab, then a graceful reload, then more: every worker has the same exact count."""
    port = free_port()
    name, *arguments = SERVERS[server].format(port=port, prefix=sys.prefix).split()
    application = next(word for word in arguments if word.endswith(":app")).removesuffix(":app")
    route = ROUTES.get(application, "/hello/{name}")
    with home.running([str(BIN / name), *arguments]) as process:
        wait_for(lambda: answers(port, "/worker"), "the server is up", 20)
        before = workers(port)
        load(port, "/hello/bob", 600)
        load(port, "/nothing/here", 200)
        expected = {("GET", route, "200"): 600, ("GET", "<unmatched>", "404"): 200}
        wait_for(lambda: counted(port) == expected, f"it is counted: {expected}", 5)
        assert [counts(port) for _ in range(16)] == [expected] * 16

        process.send_signal(signal.SIGHUP)
        wait_for(lambda: worker(port) not in before | {""}, "there are new workers", 20)
        wait_for(lambda: not workers(port) & before, "the workers are new", 20)
        wait_for(lambda: counted(port) == expected, "nothing was lost", 5)
        assert [counts(port) for _ in range(16)] == [expected] * 16
        load(port, "/hello/bob", 200)
        expected["GET", route, "200"] += 200
        wait_for(lambda: counted(port) == expected, f"it is counted: {expected}", 5)
        assert [counts(port) for _ in range(16)] == [expected] * 16
        process.terminate()
        process.wait(15)
