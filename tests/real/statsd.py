"""A real statsd and a real Graphite on loopback, with ports and directories of their own."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes import ROOT, clean_environment, free_port, running, wait_for

LOOPBACK = "127.0.0.1"

_NOT_FLUSHING = {"flushInterval": 24 * 3600 * 1000, "backends": []}
_STARTING_SECONDS = 30.0


def stats_js() -> pathlib.Path:
    """Return the path of statsd; skip the test if it is not installed, or fail if parts are required."""
    default = ROOT / ".parts" / "node_modules" / "statsd" / "stats.js"
    path = pathlib.Path(os.environ.get("TAPES_STATSD_JS") or default)
    if not path.is_file():
        absent = pytest.fail if os.environ.get("TAPES_REQUIRE_REAL") else pytest.skip
        absent(f"statsd is not installed at {path} (TAPES_STATSD_JS is another path)")
    return path


class _Daemon:
    """A program whose ports stay the same over restarts. It is ended by pid, or with its ``with`` block."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self._starts = 0
        self._running = contextlib.ExitStack()
        self._process: subprocess.Popen | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def is_up(self) -> bool:
        raise NotImplementedError

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._running.__exit__(*exception)

    def start(self) -> None:
        """Start the program and wait until it can be used."""
        self._starts += 1
        cwd = self.directory / f"run-{self._starts}"
        cwd.mkdir()
        with contextlib.ExitStack() as starting:
            self._process = starting.enter_context(running(self.command(), cwd=cwd))
            wait_for(self._is_up, f"{type(self).__name__} is up", _STARTING_SECONDS)
            self._running = starting.pop_all()

    def stop(self) -> None:
        """End the program and wait for its exit; it must have been running until then."""
        assert self._process is not None
        assert self._process.poll() is None, f"{type(self).__name__} ended by itself"
        self._running.close()

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{type(self).__name__} did not start"
        return self.is_up()


class Statsd(_Daemon):
    """``stats.js``, which listens by UDP and TCP; ``options`` are added to its configuration.

    Without a flush its counters are sums since its start; with a ``graphite_port`` it flushes there once a
    second. Names stay as they are unless ``keyNameSanitize`` is set, because a test could not see what a
    sender has failed to replace if the daemon replaced it.
    """

    def __init__(self, directory: pathlib.Path, *, graphite_port: int | None = None, **options: Any) -> None:
        super().__init__(directory / "statsd")
        self._program = stats_js()
        self.directory.mkdir()
        self.port, self.tcp_port, self.management_port = free_port(), free_port(), free_port()
        servers = [("udp", self.port), ("tcp", self.tcp_port)]
        configuration = {
            "servers": [{"server": f"./servers/{k}", "address": LOOPBACK, "port": p} for k, p in servers],
            "mgmt_address": LOOPBACK,
            "mgmt_port": self.management_port,
            "keyNameSanitize": False,
            "automaticConfigReload": False,
            **(_flushing(graphite_port) if graphite_port else _NOT_FLUSHING),
            **options,
        }
        self._configuration = self.directory / "config.js"
        self._configuration.write_text(json.dumps(configuration))
        self._settled = 0
        self._before: dict[str, float] = {}

    def command(self) -> list[str]:
        return ["node", str(self._program), str(self._configuration)]

    def is_up(self) -> bool:
        return self.ask("health", until=b"\n") == "health: up"

    def ask(self, command: str, until: bytes = b"END\n\n") -> str:
        """Return the management port's answer to a command, without the line that ends it."""
        with socket.create_connection((LOOPBACK, self.management_port), timeout=10) as connection:
            connection.sendall(command.encode() + b"\n")
            answer = b""
            while not answer.endswith(until):
                received = connection.recv(65536)
                if not received:
                    raise ConnectionResetError(f"statsd hung up after {answer!r}")
                answer += received
        return answer[: -len(until)].decode()

    def counters(self) -> dict[str, float]:
        """Return the sums since the last flush."""
        return self._recorded("counters")

    def totals(self) -> dict[str, float]:
        """Return the sums since the first start, over ends by `restart` and `down`, without zeros."""
        counted = self.counters()
        sums = {name: self._before.get(name, 0) + counted.get(name, 0) for name in {*self._before, *counted}}
        return {name: value for name, value in sums.items() if value}

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Stop statsd, and start another one on the same ports at the end of the block."""
        self._before = self.totals()
        self.stop()
        yield
        self.start()

    def restart(self) -> None:
        """Stop statsd, and start another one on the same ports."""
        with self.down():
            pass

    def gauges(self) -> dict[str, float]:
        return self._recorded("gauges")

    def timers(self) -> dict[str, list[float]]:
        """Return all values since the last flush."""
        return self._recorded("timers")

    def bad_lines(self) -> int:
        """Return how many lines were refused since the start, over flushes too."""
        found = re.search(r"^messages\.bad_lines_seen: (\d+)$", self.ask("stats"), re.MULTILINE)
        assert found is not None
        return int(found[1])

    def packets(self) -> float:
        """Return how many packets were received since the last flush."""
        return parse_object(self.ask("counters"))["statsd.packets_received"]

    def send(self, *lines: str) -> None:
        """Send a packet."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto("\n".join(lines).encode(), (LOOPBACK, self.port))

    def settle(self) -> None:
        """Wait until all earlier UDP packets are processed: statsd reads packets in their order."""
        self._settled += 1
        self.send(f"settled:{self._settled}|g")
        settled = f"settled: {self._settled}"
        wait_for(lambda: settled in self.ask("gauges"), "statsd took in all packets")

    def _recorded(self, what: str) -> dict[str, Any]:
        mine = ("statsd.", "settled")
        return {k: v for k, v in parse_object(self.ask(what)).items() if not k.startswith(mine)}


def _flushing(port: int) -> dict[str, Any]:
    """Return the options for Graphite.

    statsd flushes on the grid of seconds of its start, rounded, and stamps a flush with the rounded second.
    So no two flushes have the same stamp, also late ones and those before and after a restart, and none hides
    another one in an archive of one point a second.
    """
    return {
        "flushInterval": 1000,
        "backends": ["./backends/graphite"],
        "graphiteHost": LOOPBACK,
        "graphitePort": port,
        "graphite": {"legacyNamespace": False},
    }


class Carbon(_Daemon):
    """``carbon-cache`` with one value a second for every name, over ten minutes."""

    def __init__(self, directory: pathlib.Path) -> None:
        super().__init__(directory / "carbon")
        self.directory.mkdir()
        self.port, pickle_port, query_port = free_port(), free_port(), free_port()
        self._configuration = self.directory / "carbon.conf"
        self._configuration.write_text(f"""[cache]
STORAGE_DIR = {self.directory}
LOCAL_DATA_DIR = {self.directory}/whisper
PID_DIR = {self.directory}
LINE_RECEIVER_INTERFACE = {LOOPBACK}
LINE_RECEIVER_PORT = {self.port}
PICKLE_RECEIVER_INTERFACE = {LOOPBACK}
PICKLE_RECEIVER_PORT = {pickle_port}
CACHE_QUERY_INTERFACE = {LOOPBACK}
CACHE_QUERY_PORT = {query_port}
MAX_CREATES_PER_MINUTE = inf
MAX_UPDATES_PER_SECOND = inf
MIN_TIMESTAMP_RESOLUTION = 1
CARBON_METRIC_INTERVAL = 0
ENABLE_TAGS = False
""")
        (self.directory / "storage-schemas.conf").write_text("[all]\npattern = .*\nretentions = 1s:10m\n")

    def command(self) -> list[str]:
        files = ["--config", str(self._configuration), "--pidfile", str(self.directory / "carbon.pid")]
        return ["carbon-cache", "--nodaemon", *files, "start"]

    def is_up(self) -> bool:
        socket.create_connection((LOOPBACK, self.port), timeout=10).close()
        return True

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return time and value of all points that are on the disk, the oldest first."""
        path = (self.directory / "whisper").joinpath(*name.split(".")).with_suffix(".wsp")
        if not path.exists():
            return []
        done = subprocess.run(
            ["whisper-fetch", "--json", "--from", str(int(time.time()) - 590), str(path)],
            capture_output=True, text=True, check=False, timeout=30, env=clean_environment(),
        )  # fmt: skip
        if done.returncode:
            raise BlockingIOError(f"whisper-fetch {path}: {done.stdout}{done.stderr}")
        read = json.loads(done.stdout)
        times = range(read["start"], read["end"], read["step"])
        return [(at, value) for at, value in zip(times, read["values"]) if value is not None]


_STRING = "|".join(rf"{q}(?:[^{q}\\]|\\.)*{q}" for q in "'\"`")
_NUMBER = r"-?(?:Infinity|NaN|[\d.]+(?:e[+-]?\d+)?)"
_PAIR = re.compile(rf"(?P<name>{_STRING}|[A-Za-z_$][\w$]*): (?P<value>{_NUMBER}|\[[^\[\]]*\])")


def parse_object(text: str) -> dict[str, Any]:
    """Parse what ``util.inspect`` wrote: an object of numbers, or of lists of numbers.

    The writer cuts lists after a hundred items. That is an error here, as is everything else that can't be
    parsed.
    """
    left = _PAIR.sub("", text)
    if set(left) - set("{}, \n"):
        raise ValueError(f"not understood: {left.strip(' {},')!r} in {text!r}")
    return {_name(pair["name"]): _value(pair["value"]) for pair in _PAIR.finditer(text)}


def _name(text: str) -> str:
    if text[0] == "`":
        text = '"' + text[1:-1].replace('"', r"\"") + '"'
    return ast.literal_eval(text) if text[0] in "'\"" else text


def _value(text: str) -> Any:
    if text.startswith("["):
        return [float(item) for item in text.strip("[]").split(",") if item.strip()]
    return float(text)
