"""A burst of scrapes: each gets a complete answer or a 503 with a sentence, and later scrapes work."""

from __future__ import annotations

import json
import pathlib
import sys
import threading

import pytest

from tests.processes import free_port, get, running, wait_for

BIN = pathlib.Path(sys.executable).parent
READERS = 120
SERIES = 1000

APPLICATION = f"""
import tapes

for number in range({SERIES}):
    timer = tapes.timer("work", route=f"/some/route/number/{{number}}")
    timer.update(0.25)
    timer.update(0.5)
"""
WSGI = (
    APPLICATION
    + """
from tapes.contrib.wsgi import TapesMiddleware

def app(environ, start_response):
    start_response("200 OK", [])
    return [b"ok"]

app = TapesMiddleware(app)
"""
)
ASGI = (
    APPLICATION
    + """
from tapes.contrib.asgi import TapesMiddleware

async def app(scope, receive, send):
    assert scope["type"] != "lifespan"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})

app = TapesMiddleware(app)
"""
)
GUNICORN = ["gunicorn", "-w", "2", "-k", "gthread", "--threads", "8", "-b", "127.0.0.1:{port}", "app:app"]
UVICORN = ["uvicorn", "--workers", "2", "--port", "{port}", "app:app"]


def count_of_all(body: bytes, accept: str) -> int:
    """Return the sum of the counts of all timers."""
    if accept == "application/json":
        return sum(series["count"] for series in json.loads(body).get("work", {}).values())
    lines = [line for line in body.decode().splitlines() if line.startswith("work_seconds_count{")]
    return sum(int(line.split()[-1]) for line in lines)


def burst(port: int, accept: str) -> list[tuple[int, bytes]]:
    """Return status and body of many parallel reads."""
    answers: list[tuple[int, bytes]] = []
    begin = threading.Event()

    def read() -> None:
        begin.wait()
        status, _, body = get(port, "/metrics", Accept=accept)
        answers.append((status, body))

    readers = [threading.Thread(target=read) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    begin.set()
    for reader in readers:
        reader.join()
    return answers


@pytest.mark.parametrize("accept", ["application/json", "text/plain;version=0.0.4"])
@pytest.mark.parametrize(
    ("server", "application", "asks"),
    [(GUNICORN, WSGI, "server"), (UVICORN, ASGI, "server"), (GUNICORN, WSGI, "TAPES_HTTP")],
    ids=["gunicorn", "uvicorn", "TAPES_HTTP"],
)
def test_each_scrape_of_a_burst_gets_the_exact_counts_or_a_503(home, server, application, asks, accept):
    """Each of 120 parallel scrapes gets the exact counts of both workers, or a 503 that says to try again."""
    (home.directory / "app.py").write_text(application)
    ports = {"server": free_port(), "TAPES_HTTP": free_port()}
    command = [str(BIN / server[0]), *(part.format(port=ports["server"]) for part in server[1:])]
    port = ports[asks]
    with running(command, cwd=home.directory, **home.environment, TAPES_HTTP=str(ports["TAPES_HTTP"])):

        def has_all():
            status, _, body = get(port, "/metrics", Accept=accept)
            return status == 200 and count_of_all(body, accept) == 2 * 2 * SERIES

        wait_for(has_all, "both workers count")
        answers = burst(port, accept)
        assert len(answers) == READERS
        for status, body in answers:
            if status == 200:
                assert count_of_all(body, accept) == 4 * SERIES
            else:
                assert status == 503
                assert b"sk again" in body
        assert any(status == 200 for status, _ in answers)
        wait_for(has_all, "a reader that tries again is answered")
        for other in ports.values():
            wait_for(lambda other=other: get(other, "/metrics")[0] == 200, "so is one elsewhere")
