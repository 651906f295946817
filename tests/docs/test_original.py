"""The documentation of Tapes 0.3: its names, arguments, defaults and examples, in Python 3 syntax."""

from __future__ import annotations

import abc
import asyncio
import importlib
import inspect
import io
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import flask
import pytest

import tapes
from tapes.reporting.stream import ThreadedStreamReporter
from tapes.reporting.tornado.stream import TornadoStreamReporter
from tests.processes import EXAMPLES, free_port, get, mentions, running, wait_for

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
EMPTY = inspect.Parameter.empty


class _AnyStream:
    """Equal to a stream: what sys.stdout was when the module was imported."""

    def __eq__(self, other):
        return hasattr(other, "write")


ANY_STREAM = _AnyStream()

STATSD = [
    ("interval", EMPTY), ("host", "localhost"), ("port", 8125), ("prefix", None), ("registry", None),
]  # fmt: skip
STREAM = [("interval", EMPTY), ("stream", ANY_STREAM), ("registry", None)]

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
    "tapes.reporting:Reporter": [("interval", None), ("registry", None)],
    "tapes.reporting:Reporter.report": [],
    "tapes.reporting:ScheduledReporter": [("interval", EMPTY), ("registry", None)],
    "tapes.reporting:ScheduledReporter.start": [],
    "tapes.reporting:ScheduledReporter.stop": [],
    "tapes.reporting.http:HTTPReporter": [("port", EMPTY), ("registry", None)],
    "tapes.reporting.statsd:StatsdReporter": STATSD,
    "tapes.reporting.stream:ThreadedStreamReporter": STREAM,
    "tapes.reporting.tornado:TornadoScheduledReporter": [
        ("interval", EMPTY),
        ("registry", None),
        ("io_loop", None),
    ],
    "tapes.reporting.tornado.statsd:TornadoStatsdReporter": STATSD,
    "tapes.reporting.tornado.stream:TornadoStreamReporter": [*STREAM, ("io_loop", None)],
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
    "tapes:describe": {"unit": None, "buckets": ()},
    "tapes.reporting.statsd:StatsdReporter": {"tags": False, "protocol": "udp"},
    "tapes.reporting.tornado.statsd:TornadoStatsdReporter": {
        "io_loop": None, "tags": False, "protocol": "udp",
    },
    "tapes.reporting.http:HTTPReporter": {"host": "127.0.0.1"},
    "tapes.exposition.prometheus:render": {"openmetrics": False},
    "tapes.contrib.flask:TapesMiddleware": {
        "metrics_path": "/metrics", "exclude": (), "labels": None, "body_sizes": False, "guard": None,
        "prefix": "", "route": None,
    },
}  # fmt: skip


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
    """Arguments that the original did not have are keyword-only, with the documented defaults."""
    parameters = inspect.signature(find(path)).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords.items() >= KEYWORDS[path].items()


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


def test_the_reporting_example():
    """All reporters are used the same, by keywords; on a loop too."""
    registry, stream = tapes.Registry(), io.StringIO()
    registry.timer("my.timer").update(1)
    reporter = ThreadedStreamReporter(interval=timedelta(seconds=10), stream=stream, registry=registry)
    reporter.start()
    reporter.stop()

    async def main():
        reporter = TornadoStreamReporter(interval=timedelta(seconds=10), stream=stream, registry=registry)
        reporter.start()
        await asyncio.sleep(0.01)
        reporter.stop()

    asyncio.run(main())
    wait_for(lambda: stream.getvalue().count("\n") == 4, "each reported at its start and its end")
    for line in stream.getvalue().splitlines():
        assert json.loads(line)["my"]["timer"]["count"] == 1


def test_the_flask_example():
    """The original's Flask example works: jsonify(tapes.get_stats()) answers with the tree."""
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
        for pid in mentions(str(short_dir)):
            if os.getpgid(pid) != process.pid:  # the aggregator, which does not mind
                os.kill(pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)  # all at once, as ctrl-C does
        process.wait(5)
        wait_for(lambda: not mentions(str(short_dir)), "no process is left", 4)
        wait_for(lambda: {p.name for p in short_dir.iterdir()} == {"app.py", "output.log"}, "no file is", 4)
    assert (short_dir / "output.log").read_text() == ""
