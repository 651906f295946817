"""``tapes run``: the processes of any command, however it starts them, are one service."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import socket
import sys

import pytest

from tests.contrib.services import Load, aggregator_in_use, has_ended
from tests.processes import children, free_port, get, mentions, wait_for

BIN = pathlib.Path(sys.executable).parent
TAPES = str(BIN / "tapes")

APPLICATION = """
import json, tapes
requests = tapes.counter("requests")

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        tapes.close()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = b"here"
    if scope["path"] == "/metrics":
        body = json.dumps(tapes.get_stats()).encode()
    else:
        requests.increment()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
"""

SERVERS = {
    "uvicorn": ["uvicorn", "--workers", "2", "--log-level", "warning", "--port", "{port}", "app:app"],
    "granian": [
        "granian", "--interface", "asgi", "--workers", "2", "--log-level", "warning", "--port", "{port}",
        "app:app",
    ],
}  # fmt: skip


@pytest.mark.parametrize("server", SERVERS)
def test_servers_that_spawn_workers_count_exactly(home, server):
    """Under ``tapes run`` each request counts once over a reload by SIGHUP and the end of the server."""
    (home.directory / "app.py").write_text(APPLICATION)
    port, http = free_port(), free_port()
    name, *arguments = (argument.format(port=port) for argument in SERVERS[server])
    command = [TAPES, "run", "--http", str(http), "--", str(BIN / name), *arguments]

    def counted(source=port):
        return json.loads(get(source, "/metrics")[2]).get("requests", {}).get("value", 0)

    with home.running(command) as process:
        wait_for(lambda: get(port, "/metrics"), "the server is up")
        with Load(port, "/") as load:
            load.wait_for_requests()
            before = children(process.pid) - set(mentions("resource_tracker"))
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: all(map(has_ended, before)), "the old workers have ended")
            load.wait_for_requests()
        wait_for(lambda: counted() >= load.answered, f"{load.answered} are counted")
        assert load.answered <= counted() <= load.sent
        assert [counted() for _ in range(10)] == [counted()] * 10
        assert counted(http) == counted()
        last = counted()
        for _ in range(20):
            get(port, "/")
        with aggregator_in_use(home):
            process.terminate()
            process.wait(10)
            wait_for(lambda: counted(http) == last + 20, "the workers' last values are counted")


def test_status_and_signals_are_the_commands_own(home):
    """``tapes run`` becomes the command: exit status and signals are the command's own."""
    assert home.run([TAPES, "run", "--", "sh", "-c", "exit 7"])[0] == 7
    assert home.run([TAPES, "run", "sh", "-c", "kill -TERM $$"])[0] == -signal.SIGTERM
    code = "import tapes; tapes.counter('c').increment(5)"
    assert home.run([TAPES, "run", "--", sys.executable, "-c", code])[:2] == (0, "")


def test_processes_of_a_shell_script_are_one_service(home):
    """All processes of a shell script that record under ``tapes run`` are in one sum."""
    script = """
python() { "$PYTHON" -c "import tapes; tapes.counter('c').increment(5)"; }
python; python & python & wait
"$PYTHON" -c "import tapes; print(tapes.get_stats().c.value)"
"""
    assert home.run([TAPES, "run", "--", "sh", "-ec", script], PYTHON=sys.executable)[:2] == (0, "15\n")


def test_several_reporters_report_all_processes(home):
    """With ``--http`` and ``--statsd`` one aggregator reports all processes, each count once."""
    program = "import tapes; tapes.counter('c').increment(5)"
    script = f"""
"$PYTHON" -c "{program}" & "$PYTHON" -c "{program}" & wait
"$PYTHON" -c "import tapes, urllib.request as r; tapes.counter('c').increment(5); tapes.get_stats()
print(r.urlopen('http://127.0.0.1:$PORT/?format=prometheus').read().decode().count('c_total 15'))"
"""
    port = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(10)
        statsd = f"127.0.0.1:{receiver.getsockname()[1]}?prefix=shop&interval=0.05"
        arguments = ["run", "--http", str(port), "--statsd", statsd, "--", "sh", "-ec", script]
        done = home.run([TAPES, *arguments], PYTHON=sys.executable, PORT=str(port))
        assert done[:2] == (0, "1\n")
        wait_for(home.nothing_left, "the aggregator has left")
        receiver.setblocking(False)
        lines = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines += receiver.recv(1 << 16).decode().split("\n")
    assert sum(int(line[7:-2]) for line in lines if line.startswith("shop.c:")) == 15, lines


def test_arguments_that_cannot_work_are_explained_in_one_sentence(home):
    """``tapes run`` explains a wrong command or option in one sentence, with the status that shells use."""
    for arguments, expected, words in (
        (["run", "--", "no-such-command"], 127, "command not found: 'no-such-command'"),
        (["run"], 2, "there is no command to run"),
        (["run", "--addr", "here", "--", "true"], 1, "ipc://PATH"),
        (["run", "--http", "eighty", "--", "true"], 1, "TAPES_HTTP"),
        (["run", "--statsd", "http://localhost", "--", "true"], 1, "unix:///PATH"),
        (["walk"], 2, "invalid choice"),
    ):
        status, _, errors = home.run([TAPES, *arguments])
        assert status == expected
        assert words in errors
        assert "Traceback" not in errors
    for command in ([TAPES], [sys.executable, "-m", "tapes"]):
        assert home.run([*command, "--version"])[1].startswith("tapes 1.")


def test_tapes_disabled_runs_the_command_without_an_aggregator(home):
    """With TAPES_DISABLED=1 ``tapes run`` runs the command without an aggregator."""
    command = [TAPES, "run", "--", "sh", "-c", "echo $TAPES_ADDR"]
    assert home.run(command, TAPES_DISABLED="1") == (0, "\n", "")
