"""The documentation of Tapes 0.3: its names, arguments, defaults and examples, in Python 3 syntax.

What is listed as still to come is checked to be absent, so that the list can't be forgotten.
"""

from __future__ import annotations

import abc
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys

import flask
import pytest

import tapes
from tests.processes import EXAMPLES, free_port, get, mentions, running, wait_for

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
EMPTY = inspect.Parameter.empty

SIGNATURES = {
    "tapes.registry:Registry.counter": [("name", EMPTY)],
    "tapes.registry:Registry.gauge": [("name", EMPTY), ("producer", None)],
    "tapes.registry:Registry.histogram": [("name", EMPTY)],
    "tapes.registry:Registry.meter": [("name", EMPTY)],
    "tapes.registry:Registry.timer": [("name", EMPTY)],
    "tapes.registry:Registry.get_stats": [],
    "tapes:counter": [("name", EMPTY)],
    "tapes:gauge": [("name", EMPTY), ("producer", None)],
    "tapes:histogram": [("name", EMPTY)],
    "tapes:meter": [("name", EMPTY)],
    "tapes:timer": [("name", EMPTY)],
    "tapes:get_stats": [],
    "tapes:connect": [("addr", None)],
    "tapes:close": [],
    "tapes:Registry": [],
    "tapes.meta:metered_meta": [("metrics", EMPTY), ("base", type)],
    "tapes.reporting.http:HTTPReporter": [("port", EMPTY), ("registry", None)],
    "tapes.distributed.registry:DistributedRegistry": [("socket_addr", "ipc://tapes_metrics.ipc")],
    "tapes.distributed.registry:DistributedRegistry.connect": [],
    "tapes.distributed.registry:RegistryAggregator": [
        ("reporter", EMPTY),
        ("socket_addr", "ipc://tapes_metrics.ipc"),
    ],
    "tapes.distributed.registry:RegistryAggregator.start": [("fork", True)],
    "tapes.distributed.registry:RegistryAggregator.stop": [],
    "tapes.exposition.prometheus:render": [("registry", EMPTY)],
}

KEYWORDS = {
    "tapes.registry:Registry": {"prefix": "", "labels": None, "max_series": 2000},
    "tapes.distributed.registry:DistributedRegistry": {"prefix": "", "labels": None, "max_series": 2000},
    "tapes:gauge": {"merge": "sum", "weak": False, "labels": None},
    "tapes:counter": {"labels": None},
    "tapes:describe": {"unit": None},
    "tapes.reporting.http:HTTPReporter": {"host": "127.0.0.1"},
    "tapes.exposition.prometheus:render": {"openmetrics": False},
    "tapes.contrib.flask:TapesMiddleware": {
        "metrics_path": "/metrics", "exclude": (), "labels": None, "body_sizes": False, "guard": None,
        "prefix": "", "route": None,
    },
}  # fmt: skip

TO_COME = [
    "tapes.reporting:ScheduledReporter",
    "tapes.reporting.stream:ThreadedStreamReporter",
    "tapes.reporting.statsd:StatsdReporter",
    "tapes.reporting.tornado:TornadoScheduledReporter",
    "tapes.reporting.tornado.statsd:TornadoStatsdReporter",
    "tapes.reporting.tornado.stream:TornadoStreamReporter",
]


def find(path):
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_positional_arguments_and_defaults_are_the_originals(path):
    """In its order; what is new comes as keywords."""
    parameters = [p for p in inspect.signature(find(path)).parameters.values() if p.name != "self"]
    positional = [(p.name, p.default) for p in parameters if p.kind is POSITIONAL]
    assert positional == SIGNATURES[path]


@pytest.mark.parametrize("path", KEYWORDS)
def test_what_is_new_has_its_defaults(path):
    """Keyword-only, as the contract says."""
    parameters = inspect.signature(find(path)).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords.items() >= KEYWORDS[path].items()


@pytest.mark.parametrize("path", TO_COME)
def test_what_is_still_to_come_is_listed(path):
    """When it comes, its signature moves to the list above."""
    with pytest.raises((ImportError, AttributeError)):
        find(path)
    departures = (EXAMPLES.parent / "docs" / "departures.md").read_text()
    assert path.partition(":")[2] in departures


def test_the_convenience_functions_and_registries():
    """The quick start: repeated calls give the same instance, two registries two."""
    timer = tapes.timer("original.my.timer")
    with timer.time():
        pass
    assert tapes.timer("original.some.timer") is tapes.timer("original.some.timer")
    registry0, registry1 = tapes.Registry(), tapes.Registry()
    assert registry0.timer("some.name") is not registry1.timer("some.name")
    assert tapes.registry.Registry is tapes.Registry


def test_get_stats_is_a_dict_and_has_attributes(capsys):
    """The docstring's example, to the letter."""
    registry = tapes.Registry()
    registry.timer("my.timer")
    stats = registry.get_stats()
    print(stats["my"]["timer"]["count"])
    print(stats.my.timer.count)
    assert capsys.readouterr().out == "0\n0\n"


def test_fields_are_the_originals():
    """Each kind shows what it showed."""
    registry = tapes.Registry()
    registry.counter("c")
    registry.gauge("g", lambda: 1)
    for kind in ("meter", "histogram", "timer"):
        getattr(registry, kind)(kind)
    stats = registry.get_stats()
    rates = {"count", "m1", "m5", "m15"}
    distribution = {"count", "min", "max", "mean", "stddev", "q50", "q75", "q95", "q98", "q99", "q999"}
    assert set(stats.c) == set(stats.g) == {"value"}
    assert set(stats.meter) == rates
    assert set(stats.histogram) == distribution | {"sum"}
    assert set(stats.timer) == distribution | rates | {"sum"}


def test_the_flask_example():
    """jsonify(tapes.get_stats())"""
    app = flask.Flask("original")
    timer = tapes.timer("original.flask.timer")

    @app.route("/widgets")
    def moo():
        with timer.time():
            return "stuff"

    @app.route("/metrics")
    def metrics():
        return flask.jsonify(tapes.get_stats())

    client = app.test_client()
    assert client.get("/widgets").data == b"stuff"
    assert client.get("/metrics").json["original"]["flask"]["timer"]["count"] == 1


def test_the_metered_meta_example():
    """In Python 3 syntax: an abstract base, two handlers, three metrics."""
    registry = tapes.Registry()

    class MyCommonBaseHandler(
        metaclass=tapes.metered_meta(
            [("latency", "my.http.endpoints.{}.latency", registry.timer)], base=abc.ABCMeta
        )
    ):
        def get(self):
            with self.latency.time():
                return self.get_impl()

        @abc.abstractmethod
        def get_impl(self):
            pass

    class MyImplHandler(MyCommonBaseHandler):
        def get_impl(self):
            return {"stuff": "something"}

    class MyOtherImplHandler(MyCommonBaseHandler):
        def get_impl(self):
            return {"other stuff": "more of something"}

    MyImplHandler().get()
    MyOtherImplHandler().get()
    endpoints = registry.get_stats().my.http.endpoints
    assert {name: values.latency["count"] for name, values in endpoints.items()} == {
        "MyCommonBaseHandler": 0, "MyImplHandler": 1, "MyOtherImplHandler": 1,
    }  # fmt: skip


def test_the_tornado_pull_example(short_dir):
    """A MetricsHandler that finishes with get_stats()."""
    port = free_port()
    program = f"""
import signal
import tapes
from tornado import gen, ioloop, web

class MetricsHandler(web.RequestHandler):
    @gen.coroutine
    def get(self, *args, **kwargs):
        self.finish(tapes.get_stats())

tapes.counter("hits").increment(3)
web.Application([("/metrics", MetricsHandler)]).listen({port}, address="127.0.0.1")
ioloop.IOLoop.current().start()
"""
    with running([sys.executable, "-c", program], cwd=short_dir):
        wait_for(lambda: get(port, "/metrics"), "it is up")
        assert json.loads(get(port, "/metrics")[2]) == {"hits": {"value": 3}}


@pytest.mark.needs("ab")
def test_the_multi_process_tornado_example(short_dir):
    """Class-level timer, aggregator before the fork, connect() after it: one port answers for all."""
    app_port, metrics_port = free_port(), free_port()
    source = (EXAMPLES / "tornado_original.py").read_text()
    assert "HTTPReporter(8889)" in source
    source = source.replace("8889", str(metrics_port)).replace("8888", str(app_port))
    (short_dir / "app.py").write_text(source)
    with running([sys.executable, "app.py"], cwd=short_dir) as process:
        wait_for(lambda: get(app_port, "/")[0] == 200, "the application is up")
        done = subprocess.run(
            ["ab", "-q", "-n", "2000", "-c", "8", f"http://127.0.0.1:{app_port}/"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "Complete requests:      2000\n" in done.stdout

        def merged():
            return json.loads(get(metrics_port, "/")[2])["my"]["timer"]["count"]

        # The one request that found the application up was counted too.
        wait_for(lambda: merged() == 2001, "all is merged, exactly")
        for pid in mentions(str(short_dir)):  # as ctrl-C does
            os.kill(pid, signal.SIGINT)
        process.wait(5)
        wait_for(lambda: not mentions(str(short_dir)), "no process is left", 4)
        wait_for(lambda: {p.name for p in short_dir.iterdir()} == {"app.py", "output.log"}, "no file is", 4)
    assert (short_dir / "output.log").read_text() == ""
