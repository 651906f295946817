"""A server that forks a process for each request: each request counts, although no exit hook runs."""

from __future__ import annotations

import json
import sys

import pytest

from tests.contrib.services import counts
from tests.processes import free_port, get, wait_for

APPLICATION = """
import sys, flask, tapes
from tapes.contrib.flask import Tapes
app = flask.Flask("shop")
Tapes(app)
jobs = tapes.counter("jobs")

@app.get("/")
def index():
    jobs.increment(2)
    return "hi"
"""
SERVERS = {
    "werkzeug": "app.run(port=int(sys.argv[1]), processes=4, threaded=False)",
    "socketserver": """
import socketserver
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer, make_server

class Handler(WSGIRequestHandler):
    def handle(self):
        self.raw_requestline = self.rfile.readline(65537)
        if self.parse_request():
            handler = ServerHandler(
                self.rfile, self.wfile, sys.stderr, self.get_environ(), multithread=False, multiprocess=True
            )
            handler.request_handler = self
            handler.run(self.server.get_app())

    def log_message(self, *_):
        pass

class Forking(socketserver.ForkingMixIn, WSGIServer):
    pass

make_server("127.0.0.1", int(sys.argv[1]), app, Forking, Handler).serve_forever()
""",
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("has_address", [False, True])
def test_each_request_of_a_forking_server_is_counted(home, server, has_address):
    """A process forked for ``/metrics`` shows the counts of all processes that were forked for requests."""
    port = free_port()
    (home.directory / "server.py").write_text(APPLICATION + SERVERS[server])
    command = [sys.executable, "server.py", str(port)]
    if has_address:
        command = [sys.executable, "-m", "tapes", "run", "--", *command]
    with home.running(command):
        # The first request starts the aggregator, unless there is one. A request for metrics is not counted.
        wait_for(lambda: get(port, "/metrics")[0] == 200, "the server is up")
        for _ in range(30):
            assert get(port, "/")[0] == 200
        assert counts(port) == {("GET", "/", "200"): 30}
        assert json.loads(get(port, "/metrics")[2])["jobs"]["value"] == 60
