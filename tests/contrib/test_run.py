"""``tapes run``: any command, whatever starts its processes."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from tests.contrib.services import Load
from tests.processes import answers, clean_environment, free_port, get, mentions, running, wait_for

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


class Home:
    """Directories that a command may use, empty before and after."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.private = directory / "tmp"
        self.private.mkdir()
        self.environment = {"TMPDIR": str(self.private), "XDG_RUNTIME_DIR": str(self.private)}

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [TAPES, *arguments], cwd=self.directory, env=clean_environment(**self.environment, **more),
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    def nothing_left(self) -> bool:
        return not mentions(str(self.directory)) and not list(self.private.iterdir())


@pytest.fixture
def home(short_dir):
    """Where a command runs; nothing of tapes is left of it within 4 s."""
    home = Home(short_dir)
    yield home
    wait_for(home.nothing_left, "nothing is left", 4)


def children(pid: int) -> set[int]:
    """The pids of a process's children."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return {int(child) for child in file.read().split()}


@pytest.mark.parametrize("server", SERVERS)
def test_servers_that_spawn_their_workers(home, server):
    """A reload under load by HUP, then an end: every answered request counts once."""
    (home.directory / "app.py").write_text(APPLICATION)
    port, http = free_port(), free_port()
    name, *arguments = (argument.format(port=port) for argument in SERVERS[server])
    command = [TAPES, "run", "--http", str(http), "--", str(BIN / name), *arguments]

    def counted(source=port):
        return json.loads(get(source, "/metrics")[2]).get("requests", {}).get("value", 0)

    with running(command, cwd=home.directory, **home.environment) as process:
        wait_for(lambda: answers(port, "/metrics"), "the server is up", 20)
        with Load(port, "/") as load:
            load.go_on()
            before = children(process.pid)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: len(before & children(process.pid)) <= 1, "the workers are new", 20)
            load.go_on()
        wait_for(lambda: counted() >= load.answered, f"{load.answered} are counted")
        assert load.answered <= counted() <= load.sent
        assert [counted() for _ in range(10)] == [counted()] * 10
        assert counted(http) == counted()
        last = counted()
        for _ in range(20):
            get(port, "/")
        process.terminate()
        process.wait(10)
        # The aggregator stays for a while: what the workers said last is there.
        assert counted(http) == last + 20


def test_status_and_signals_are_the_commands_own(home):
    """It becomes the command."""
    assert home.run("run", "--", "sh", "-c", "exit 7").returncode == 7
    assert home.run("run", "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM
    done = home.run("run", "--", sys.executable, "-c", "import tapes; tapes.counter('c').increment(5)")
    assert (done.returncode, done.stdout) == (0, "")


def test_processes_of_a_shell_script_are_one_service(home):
    """One after the other and side by side: whatever uses tapes is in the sum."""
    script = """
python() { "$PYTHON" -c "import tapes; tapes.counter('c').increment(5)"; }
python; python & python & wait
"$PYTHON" -c "import tapes; print(tapes.get_stats().c.value)"
"""
    done = home.run("run", "--", "sh", "-ec", script, PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (0, "15\n")


def test_what_can_not_be_run_says_why(home):
    """One sentence each, and the status that shells use."""
    for arguments, status, words in (
        (["run", "--", "no-such-command"], 127, "there is no command 'no-such-command'"),
        (["run"], 2, "there is no command to run"),
        (["run", "--addr", "here", "--", "true"], 1, "ipc://PATH"),
        (["run", "--http", "eighty", "--", "true"], 1, "TAPES_HTTP"),
        (["walk"], 2, "invalid choice"),
    ):
        done = home.run(*arguments)
        assert done.returncode == status
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert home.run("--version").stdout.startswith("tapes 1.")
    module = [sys.executable, "-m", "tapes", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout.startswith("tapes 1.")


def test_turned_off_it_runs_the_command_all_the_same(home):
    """TAPES_DISABLED=1: no aggregator."""
    done = home.run("run", "--", "sh", "-c", "echo $TAPES_ADDR", TAPES_DISABLED="1")
    assert (done.stdout, done.stderr) == ("\n", "")
