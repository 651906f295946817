"""Four gunicorn workers, real requests over loopback, and one right answer from any of them.

Sends a known number of requests, then asks a worker for the metrics of the whole service, and exits 0 only if
what was sent and what was merged agree, route by route. With ``SERVE=1`` it then stays up. Needs a free port
and about twelve seconds.
"""

from __future__ import annotations

import collections
import contextlib
import glob
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

WORKERS = 4
CLIENTS = 8
TICK = 5.0
SECONDS = 6.5  # so that a tick of the moving rates passes
MAX_REQUESTS = 20_000
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIVE = sys.stdout.isatty()
HERE = pathlib.Path(__file__).parent

# The requests to send, and the labels under which the service must count each.
REQUESTS = [
    ("GET", "/", ("GET", "/", "200")),
    ("GET", "/articles/{n}", ("GET", "/articles/<int:number>", "200")),
    ("GET", "/articles/{n}", ("GET", "/articles/<int:number>", "200")),
    ("GET", "/articles/999", ("GET", "/articles/<int:number>", "404")),
    ("POST", "/orders", ("POST", "/orders", "201")),
    ("GET", "/old-catalogue", ("GET", "/old-catalogue", "410")),
    ("GET", "/no/such/page/{n}", ("GET", "<unmatched>", "404")),
]

Series = tuple[str, str, str]


class Clients:
    """Threads that send requests and count the answers by series and worker."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sent: collections.Counter[tuple[Series, str]] = collections.Counter()
        self.wrong: list[str] = []
        self.failed = 0
        self._lock = threading.Lock()
        self._end = time.monotonic() + SECONDS

    def run(self) -> None:
        threads = [threading.Thread(target=self._send, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2 if LIVE else 1.0)
            with self._lock:
                total = sum(self.sent.values())
                workers = len({worker for _, worker in self.sent})
            left = max(0.0, self._end - time.monotonic())
            start, end = ("\r", "") if LIVE else ("", "\n")
            show(f"{start}  {total:6d} requests answered by {workers} workers, {left:3.1f} s to go {end}")
        show("\n")

    def _send(self, client: int) -> None:
        for turn in range(MAX_REQUESTS // CLIENTS):
            if time.monotonic() > self._end:
                return
            method, path, series = REQUESTS[(turn + client) % len(REQUESTS)]
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            try:
                connection.request(method, path.format(n=turn % 900))
                response = connection.getresponse()
                response.read()
            except OSError as error:
                with self._lock:
                    self.failed += 1
                    self.wrong.append(f"{method} {path}: {error!r}")
                return
            finally:
                connection.close()
            with self._lock:
                self.sent[series, response.headers["X-Worker"]] += 1
                if str(response.status) != series[2]:
                    self.wrong.append(f"{method} {path}: status {response.status}")


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_service(port: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "gunicorn", "-w", str(WORKERS), "-b", f"127.0.0.1:{port}",
        "--log-level", "warning", "-c", "python:tapes.contrib.gunicorn_conf", "flask_shop:app",
    ]  # fmt: skip
    show("  $ gunicorn " + " ".join(command[3:]) + "\n")
    return subprocess.Popen(command, cwd=HERE, start_new_session=True)


def get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"{path}: status {response.status}: {body.decode()}")
    return body


def wait_until_up(service: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            get(port, "/metrics")
            return
        except OSError as error:
            if service.poll() is not None:
                raise SystemExit(f"gunicorn ended with status {service.returncode}") from None
            if time.monotonic() > deadline:
                raise SystemExit(f"the service did not come up ({error})") from None
            time.sleep(0.05)


def wait_for_tick() -> None:
    """Wait for the next tick of the rates (every 5 s in all processes), so that m1 is complete."""
    seconds = TICK - time.monotonic() % TICK
    show(f"  waiting {seconds:.1f} s for the next tick of the moving rates\n")
    time.sleep(seconds)


def merged(port: int) -> dict[Series, dict[str, float]]:
    """Return the answer of one worker for the whole service, by series."""
    tree = json.loads(get(port, "/metrics"))["http"]["server"]["request"]["duration"]
    found = {}
    for selector, values in tree.items():
        labels = dict(pair.split("=", 1) for pair in selector.strip("{}").split('",'))
        labels = {name: value.strip('"') for name, value in labels.items()}
        found[labels["method"], labels["route"], labels["status"]] = values
    return found


def compare(clients: Clients, answer: dict[Series, dict[str, float]]) -> bool:
    """Print what was sent, each worker's share and the merged count by series; return whether all agree."""
    workers = sorted({worker for _, worker in clients.sent})
    show(f"\n  {'':38s}        each worker's own share{'':{6 * len(workers) - 20}s}merged, from any worker\n")
    head = "".join(f"{worker:>7s}" for worker in workers)
    show(f"  {'route':38s}{'sent':>7s}{head}{'count':>9s}{'m1':>8s}{'q50':>9s}{'q99':>9s}\n")
    agreed = True
    series_sent = {series for series, _ in clients.sent}
    for series in sorted(series_sent | set(answer)):
        shares = [clients.sent[series, worker] for worker in workers]
        sent = sum(shares)
        values = answer.get(series, {"count": 0, "m1": 0.0, "q50": 0.0, "q99": 0.0})
        same = sent == values["count"]
        agreed = agreed and same
        row = "".join(f"{share:7d}" for share in shares)
        show(
            f"  {' '.join(series):38s}{sent:7d}{row}{values['count']:9d}"
            f"{values['m1']:6.1f}/s{values['q50'] * 1e3:7.2f}ms{values['q99'] * 1e3:7.2f}ms"
            f"{'' if same else '   <-- differs'}\n"
        )
    show("\n  m1: requests per second over the last minute; q50, q99: the median and the 99th percentile\n")
    return agreed


def main() -> int:
    port = free_port()
    show(f"tapes demo: a Flask application behind gunicorn with {WORKERS} workers\n\n")
    service = start_service(port)
    try:
        wait_until_up(service, port)
        wait_for_tick()
        clients = Clients(port)
        clients.run()
        deadline = time.monotonic() + 5
        answer = merged(port)
        total = sum(clients.sent.values())
        while sum(values["count"] for values in answer.values()) < total and time.monotonic() < deadline:
            time.sleep(0.05)
            answer = merged(port)
        agreed = compare(clients, answer) and not clients.wrong
        for problem in clients.wrong[:10]:
            show(f"  unexpected: {problem}\n")
        verdict = "agree" if agreed else "DO NOT AGREE"
        show(f"\n  {total} requests sent and answered; sent and merged {verdict}\n")
        if os.environ.get("SERVE"):
            serve(port)
        return 0 if agreed else 1
    except KeyboardInterrupt:
        show("\n  interrupted\n")
        return 130
    finally:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)  # a second ctrl-C must not end this before the service
        stop(service)


def serve(port: int) -> None:
    show("\n  The service stays up. Open these pages; press ctrl-C to stop it:\n")
    for path in ("/", "/articles/7", "/metrics", "/metrics?format=prometheus"):
        show(f"    http://127.0.0.1:{port}{path}\n")
    try:
        signal.pause()
    except KeyboardInterrupt:
        show("\n  stopping\n")


def stop(service: subprocess.Popen[bytes]) -> None:
    if service.poll() is None:
        service.terminate()
    try:
        service.wait(10)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()
    wait_until_gone(service.pid)


def wait_until_gone(master: int) -> None:
    """Wait until the aggregator has exited, after the last worker, and has removed its directory."""
    parents = {os.environ.get("XDG_RUNTIME_DIR") or "/tmp", tempfile.gettempdir(), "/tmp"}
    deadline = time.monotonic() + 4
    while any(glob.glob(f"{parent}/tapes-{master}-*") for parent in parents):
        if time.monotonic() > deadline:
            show("  the aggregator is still running\n")
            return
        time.sleep(0.05)
    show("  gunicorn and the aggregator have ended; nothing is left behind\n")


@contextlib.contextmanager
def terminal():
    """Keep ctrl-C from the processes that started this one; make would report it as an error."""
    try:
        group = os.tcgetpgrp(sys.stdin.fileno())
        if group != os.getpgrp() or group == os.getpid():
            raise OSError("this process is not in the foreground, or leads its group")
    except (OSError, ValueError):
        yield
        return
    # Without this, tcsetpgrp stops a process in the background, and ctrl-Z stops only this process.
    for number in (signal.SIGTTOU, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(sys.stdin.fileno(), os.getpgrp())
    try:
        yield
    finally:
        os.tcsetpgrp(sys.stdin.fileno(), group)


if __name__ == "__main__":
    for number in ENDS:
        signal.signal(number, signal.default_int_handler)
    with terminal():
        status = main()
    sys.exit(status)
