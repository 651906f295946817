"""TapesMiddleware: what it records, and that nobody notices it."""

from __future__ import annotations

import gc
import io
import json
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import flask
import pytest
import webtest
import webtest.lint
from flask.testing import FlaskClient

import tapes
from tapes.contrib.flask import TapesMiddleware
from tapes.contrib.wsgi import TapesMiddleware as WSGIMiddleware
from tapes.errors import InvalidArgument, InvalidLabel, InvalidName
from tapes.testing import ManualClock
from tests.contrib.recorded import DURATION, active, counts


@pytest.fixture
def registry():
    return tapes.Registry()


def flask_app(registry, **options):
    app = flask.Flask("shop")
    app.test_client_class = Client
    blueprint = flask.Blueprint("admin", "admin", url_prefix="/admin")

    @app.route("/users/<int:number>", methods=["GET", "POST"])
    def user(number):
        if number == 404:
            flask.abort(404)
        return f"user {number}"

    @app.route("/gone")
    def gone():
        flask.abort(410)

    @app.route("/broken")
    def broken():
        raise RuntimeError("broken")

    @app.route("/stream")
    def stream():
        return flask.Response(str(n) for n in range(3))

    @blueprint.route("/things/<path:name>")
    def things(name):
        return name

    app.register_blueprint(blueprint)
    app.wsgi_app = TapesMiddleware(app.wsgi_app, registry, **options)
    return app


class Client(FlaskClient):
    """Reads every answer to its end, as a server does."""

    def open(self, *args, **kwargs):
        return super().open(*args, buffered=True, **kwargs)


def test_flask_requests_are_counted_by_template(registry):
    """Never by raw path; what matches nothing shares one series; invented methods another."""
    client = flask_app(registry).test_client()
    for number in range(5):
        client.get(f"/users/{number}")
        client.get(f"/nothing/{number}")
        client.open(f"/users/{number}", method=f"BREW{number}")
    client.post("/users/1")
    client.get("/users/404")
    client.get("/gone")
    client.get("/broken")
    client.get("/admin/things/a/b/c")
    client.head("/users/3")
    assert counts(registry) == {
        ("GET", "/users/<int:number>", "200"): 5,
        ("HEAD", "/users/<int:number>", "200"): 1,
        ("POST", "/users/<int:number>", "200"): 1,
        ("GET", "/users/<int:number>", "404"): 1,
        ("GET", "<unmatched>", "404"): 5,
        ("_OTHER", "<unmatched>", "405"): 5,
        ("GET", "/gone", "410"): 1,
        ("GET", "/broken", "500"): 1,
        ("GET", "/admin/things/<path:name>", "200"): 1,
    }
    assert active(registry) == 0


def test_both_import_paths_are_the_same():
    """tapes.contrib.flask re-exports it."""
    assert TapesMiddleware is WSGIMiddleware


def test_the_default_registry_is_the_default():
    """One line is enough."""
    app = flask.Flask("shop")
    app.test_client_class = Client
    app.wsgi_app = TapesMiddleware(app.wsgi_app)
    app.test_client().get("/only-in-this-test")
    assert ("GET", "<unmatched>", "404") in counts(tapes.default_registry)


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_metrics_are_mounted_with_and_without_a_slash(registry, path):
    """JSON by default, no cache, not measured itself."""
    client = flask_app(registry).test_client()
    client.get("/gone")
    response = client.get(path)
    assert response.status_code == 200
    assert response.content_type == "application/json"
    assert response.headers["Vary"] == "Accept"
    assert response.headers["Cache-Control"] == "no-store"
    selector = '{method="GET",route="/gone",status="410"}'
    assert json.loads(response.data)["http"]["server"]["request"]["duration"][selector]["count"] == 1
    assert set(counts(registry)) == {("GET", "/gone", "410")}


def test_metrics_are_negotiated(registry):
    """By Accept, or by ?format=."""
    client = flask_app(registry).test_client()
    client.get("/gone")
    text = client.get("/metrics", headers={"Accept": "text/plain"})
    assert text.content_type == "text/plain; version=0.0.4; charset=utf-8"
    line = b'http_server_request_duration_seconds_count{method="GET",route="/gone",status="410"} 1'
    assert line in text.data
    assert client.get("/metrics?format=openmetrics").data.endswith(b"# EOF\n")
    assert client.get("/metrics?format=yaml").status_code == 400
    assert client.post("/metrics").status_code == 405
    assert (client.head("/metrics").status_code, client.head("/metrics").data) == (200, b"")


def test_options(registry):
    """Path, exclusion, labels, guard, prefix, sizes, route."""
    app = flask_app(
        registry,
        metrics_path="/internal/metrics",
        exclude=["/gone"],
        labels=lambda environ: {"tenant": environ["HTTP_HOST"]},
        guard=lambda environ: environ.get("HTTP_X_TOKEN") == "secret",
        prefix="shop",
        body_sizes=True,
    )
    client = app.test_client()
    client.get("/gone")
    client.post("/users/1", data=b"12345")
    assert client.get("/metrics").status_code == 404
    assert client.get("/internal/metrics").status_code == 403
    assert client.get("/internal/metrics", headers={"X-Token": "secret"}).status_code == 200
    snapshot = registry.snapshot()
    labels = {"method": "POST", "route": "/users/<int:number>"}
    assert snapshot.get("shop." + DURATION, **labels, status="200", tenant="localhost").count == 1
    assert snapshot.get("shop.http.server.request.body.size", **labels).sum == 5
    assert snapshot.get("shop.http.server.response.body.size", **labels).sum == len("user 1")
    assert {dict(s.labels)["route"] for s in snapshot.series("shop." + DURATION)} == {
        "/users/<int:number>",
        "<unmatched>",
    }


def test_metrics_can_be_off(registry):
    """metrics_path=None leaves the path to the application."""
    assert flask_app(registry, metrics_path=None).test_client().get("/metrics").status_code == 404
    with pytest.raises(InvalidArgument, match="/metrics"):
        TapesMiddleware(lambda *_: [], metrics_path="metrics")


@pytest.mark.parametrize("may_start", ["0", "1"])
def test_one_of_several_processes_never_answers_for_all(registry, monkeypatch, may_start):
    """It may not join, or can't see the others: 503 and what to do, not its own share."""
    monkeypatch.setenv("TAPES_AUTOSTART", may_start)
    response = flask_app(registry).test_client().get(
        "/metrics", environ_overrides={"wsgi.multiprocess": True}
    )  # fmt: skip
    assert response.status_code == 503
    assert b"TAPES_ADDR" in response.data


def test_a_bare_application_names_its_routes(registry):
    """route= is for frameworks that the adapter doesn't know; what fails there is <unmatched>."""

    def app(environ, start_response):
        start_response("204 No Content", [])
        return []

    def route(environ):
        return {"/a": "/a", "/b": None}[environ["PATH_INFO"]]

    wrapped = webtest.TestApp(TapesMiddleware(app, registry, route=route))
    wrapped.get("/a")
    wrapped.get("/b")
    assert counts(registry) == {("GET", "/a", "204"): 1, ("GET", "<unmatched>", "204"): 1}


def test_a_failing_callable_of_the_user_does_not_break_the_request(registry, caplog):
    """It is logged; the request is answered, and counted without it."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"fine"]

    for labels in (lambda environ: 1 / 0, lambda environ: {"a-b": 1}, lambda environ: {"method": "x"}):
        wrapped = webtest.TestApp(TapesMiddleware(app, registry, labels=labels))
        assert wrapped.get("/a").body == b"fine"
    assert counts(registry) == {("GET", "<unmatched>", "200"): 3}
    assert "labels" in caplog.text
    assert active(registry) == 0
    guarded = TapesMiddleware(app, registry, guard=lambda environ: 1 / 0)
    assert webtest.TestApp(guarded).get("/metrics", status=403)
    with pytest.raises(InvalidLabel):
        TapesMiddleware(app, registry, labels={"a-b": 1})


def test_label_values_are_told_apart_by_their_text(registry):
    """True, 1 and a list are labels too."""
    for value in (True, 1, ["a"]):
        list(call(TapesMiddleware(serving([]), registry, labels={"l": value})))
    texts = {dict(series.labels)["l"] for series in registry.snapshot().series(DURATION)}
    assert texts == {"True", "1", "['a']"}


APPS = {}


def app(function):
    APPS[function.__name__] = function
    return function


@app
def plain(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


@app
def generator(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"a"
    yield b""
    yield b"b"


@app
def writes(environ, start_response):
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    write(b"a")
    return [b"b"]


@app
def replaces(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    try:
        raise RuntimeError
    except RuntimeError:
        import sys

        start_response("500 Error", [("Content-Type", "text/plain")], sys.exc_info())
    return [b"x"]


@app
def no_content(environ, start_response):
    start_response("304 Not Modified", [])
    return []


@app
def reads(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [body]


ANSWERS_HEAD = ("no_content", "reads")  # the others would break the protocol by themselves


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name in APPS for m in ("GET", "HEAD", "POST") if m != "HEAD" or name in ANSWERS_HEAD],
)
def test_the_protocol_is_kept_to_the_letter(registry, name, method):
    """wsgiref's validator and webtest's lint, on both sides of the middleware."""
    inner = validator(APPS[name])
    wrapped = webtest.lint.middleware(validator(TapesMiddleware(inner, registry)))
    bare = webtest.TestApp(validator(APPS[name]), lint=False)
    measured = webtest.TestApp(wrapped, lint=False)
    args = {"method": method, "expect_errors": True}
    if method == "POST":
        args |= {"body": b"12345", "headers": {"Content-Type": "text/plain"}}
    expected, got = bare.request("/x?y=1", **args), measured.request("/x?y=1", **args)
    assert (got.status, got.headerlist, got.body) == (expected.status, expected.headerlist, expected.body)
    assert counts(registry) == {(method, "<unmatched>", expected.status[:3]): 1}
    assert active(registry) == 0


class Body:
    """A body that notes what is done to it."""

    def __init__(self, pieces, fail_at=None):
        self.pieces, self.fail_at, self.closed = list(pieces), fail_at, 0

    def __iter__(self):
        for number, piece in enumerate(self.pieces):
            if number == self.fail_at:
                raise RuntimeError("in the middle")
            yield piece

    def close(self):
        self.closed += 1


def call(application, **environ):
    setup_testing_defaults(environ)
    environ["wsgi.input"] = io.BytesIO()
    return application(environ, lambda status, headers, exc_info=None: None)


def serving(body, status="200 OK", headers=()):
    def application(environ, start_response):
        start_response(status, list(headers))
        return body

    return application


def test_a_body_is_closed_once_and_counted_once(registry):
    """As a server does: iterate, then close."""
    body = Body([b"a", b"b"])
    result = call(TapesMiddleware(serving(body), registry))
    assert active(registry) == 1
    assert list(result) == [b"a", b"b"]
    result.close()
    result.close()
    assert body.closed == 2  # as often as the server calls it, and no more
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}
    assert active(registry) == 0


def test_a_body_has_a_length_if_it_had_one(registry):
    """Servers make a Content-Length of it; a body without one has none."""
    assert len(call(TapesMiddleware(serving([b"a", b"b"]), registry))) == 2
    with pytest.raises(TypeError):
        len(call(TapesMiddleware(serving(iter([b"a"])), registry)))


def test_what_the_servers_file_wrapper_made_reaches_the_server(registry):
    """As it is, so that it can be sent by the system; the request ends with its close(), which runs once."""
    file = io.BytesIO(b"text")
    made = []

    def application(environ, start_response):
        start_response("200 OK", [])
        made.append(environ["wsgi.file_wrapper"](file))
        return made[-1]

    for wrapper in (FileWrapper, lambda file: file):  # uWSGI's returns the file itself
        body = call(TapesMiddleware(application, registry), **{"wsgi.file_wrapper": wrapper})
        assert body is made[-1]
        body.close()
        assert file.closed
        assert active(registry) == 0
    assert counts(registry) == {("GET", "<unmatched>", "200"): 2}


def test_a_client_that_goes_away_is_a_499(registry):
    """The server stops asking in the middle; not, if it has all that Content-Length says."""
    for length, pieces, status in (("9", 1, "499"), ("2", 1, "499"), ("2", 2, "200"), ("2", 0, "200")):
        body = Body([b"a", b"b", b""])
        result = call(TapesMiddleware(serving(body, headers=[("content-length", length)]), registry))
        for _, _piece in zip(range(pieces), result):
            pass
        result.close()
        assert body.closed == 1
        assert counts(registry).pop(("GET", "<unmatched>", status)) > 0
    assert counts(registry) == {("GET", "<unmatched>", "499"): 2, ("GET", "<unmatched>", "200"): 2}
    assert active(registry) == 0


def test_a_body_that_is_dropped_ends_its_request(registry):
    """By a test client that has seen enough and forgets to close it."""
    result = call(TapesMiddleware(serving([b"a", b"b"]), registry))
    iterator = iter(result)
    next(iterator)
    assert active(registry) == 1
    del result, iterator
    gc.collect()
    assert active(registry) == 0


def test_the_answer_may_start_late(registry):
    """A generator starts it when it is asked for its first piece, and not before."""
    started = []
    environ = {"wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    result = TapesMiddleware(generator, registry)(environ, lambda *args: started.append(args))
    assert not started
    assert next(iter(result)) == b"a"
    assert started == [("200 OK", [("Content-Type", "text/plain")])]


def test_start_response_gets_what_the_application_gave(registry):
    """exc_info as well; what the server raises reaches the application."""
    calls = []
    error = (ValueError, ValueError(), None)

    def application(environ, start_response):
        start_response("200", [])
        start_response("404 ", [("a", "b")], error)
        with pytest.raises(RuntimeError, match="sent"):
            start_response("500 Error", [], exc_info=error)
        return []

    def server(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("headers are sent")
        return "write"

    environ = {"wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    list(TapesMiddleware(application, registry)(environ, server))
    assert calls == [("200", []), ("404 ", [("a", "b")], error), ("500 Error", [], error)]
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}


def test_what_clients_claim_breaks_nothing(registry):
    """A length of 5,000 digits, or of none: the request is answered, and nothing stays active."""
    app = TapesMiddleware(serving([b"x"]), registry, body_sizes=True, labels=lambda environ: {"a": "b"})
    for length in ("9" * 5000, "-1", "x", "٣", ""):
        assert b"".join(call(app, CONTENT_LENGTH=length)) == b"x"
    assert active(registry) == 0
    labels = {"method": "GET", "route": "<unmatched>"}
    sizes = registry.snapshot().get("http.server.request.body.size", **labels)
    assert (sizes.count, sizes.sum) == (5, 3)  # an Arabic three is a three


@pytest.mark.parametrize("body", [None, b"raw", "text"], ids=repr)
def test_what_is_no_body_is_the_servers_to_refuse(registry, body):
    """Or to send, as some do: it comes back as it is."""
    assert call(TapesMiddleware(serving(body), registry)) is body
    assert active(registry) == 0


def test_pieces_that_are_no_bytes_are_the_servers_to_refuse(registry):
    """They come through."""
    assert list(call(TapesMiddleware(serving([None, 1, b"x"]), registry))) == [None, 1, b"x"]


def test_granian_gets_its_list(registry):
    """It sends a list at once, with a length."""
    body = [b"a", b"b"]
    assert call(TapesMiddleware(serving(body), registry), SERVER_SOFTWARE="Granian") is body
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}


def test_answers_that_are_cut_short_for_a_reason(registry):
    """A HEAD has no body to read; an application that never starts to answer is a 500 of the server."""
    for method in ("HEAD", "GET"):
        result = call(TapesMiddleware(serving(Body([b"a", b"b"])), registry), REQUEST_METHOD=method)
        next(iter(result))
        result.close()
    result = call(TapesMiddleware(lambda environ, start_response: Body([b"a", b"b"]), registry))
    next(iter(result))
    result.close()
    assert counts(registry) == {
        ("HEAD", "<unmatched>", "200"): 1,
        ("GET", "<unmatched>", "499"): 1,
        ("GET", "<unmatched>", "500"): 1,
    }


def test_a_guard_that_has_to_be_awaited_lets_nobody_in(registry, caplog):
    """As nobody awaits it here."""

    async def guard(environ):
        return True

    webtest.TestApp(TapesMiddleware(plain, registry, guard=guard)).get("/metrics", status=403)
    assert "awaited" in caplog.text


def test_the_token_from_the_environment(registry, monkeypatch):
    """401 without it; a guard of the application decides alone."""
    monkeypatch.setenv("TAPES_METRICS_TOKEN", "secret")
    app = webtest.TestApp(TapesMiddleware(plain, registry))
    assert app.get("/metrics", status=401).headers["WWW-Authenticate"] == 'Bearer realm="metrics"'
    assert app.get("/metrics", headers={"Authorization": "bearer secret"}).json
    guarded = webtest.TestApp(TapesMiddleware(plain, registry, guard=lambda environ: True))
    assert guarded.get("/metrics").json


def test_turned_off_nothing_is_measured(registry, monkeypatch):
    """TAPES_DISABLED: the application's own body comes back; the metrics say that they are off."""
    monkeypatch.setenv("TAPES_DISABLED", "1")
    body = [b"a"]
    app = TapesMiddleware(serving(body), registry)
    assert call(app) is body
    assert b"TAPES_DISABLED" in webtest.TestApp(app).get("/metrics", status=503).body
    assert counts(registry) == {}


def test_a_body_that_is_never_iterated_is_counted(registry):
    """close() alone ends a request."""
    call(TapesMiddleware(serving(Body([b"a"])), registry)).close()
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}
    assert active(registry) == 0


def test_an_exception_in_the_middle_reaches_the_server_and_is_a_500(registry):
    """Recorded once, raised unchanged, and the body is still closed."""
    body = Body([b"a", b"b"], fail_at=1)
    result = call(TapesMiddleware(serving(body), registry))
    assert next(result) == b"a"
    with pytest.raises(RuntimeError, match="in the middle"):
        next(result)
    result.close()
    assert body.closed == 1
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}
    assert active(registry) == 0


def test_an_exception_of_the_application_reaches_the_server(registry):
    """Before it started to answer."""

    def broken(environ, start_response):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        call(TapesMiddleware(broken, registry))
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}
    assert active(registry) == 0


def test_a_stream_is_timed_to_its_last_byte():
    """Not to the return of the application."""
    clock = ManualClock(100.0)
    registry = tapes.Registry(clock=clock)

    def slow(environ, start_response):
        start_response("200 OK", [])
        for _ in range(4):
            clock.advance(0.25)
            yield b"x"

    list(call(TapesMiddleware(slow, registry)))
    (series,) = registry.snapshot().series(DURATION)
    assert series.sum == 1.0


def test_invented_paths_and_methods_make_no_more_series(registry):
    """10,000 paths and 500 methods: two series."""
    application = TapesMiddleware(serving([], "404 Not Found"), registry)
    for number in range(10_000):
        list(call(application, PATH_INFO=f"/{number}"))
    for number in range(500):
        list(call(application, REQUEST_METHOD=f"M{number}"))
    assert counts(registry) == {("GET", "<unmatched>", "404"): 10_000, ("_OTHER", "<unmatched>", "404"): 500}


def test_a_prefix_that_is_taken_is_refused_when_the_adapter_is_made():
    """Not in a request: names that begin with 'tapes.' are those of metrics about tapes itself."""
    with pytest.raises(InvalidName, match=r"'tapes\.'"):
        TapesMiddleware(lambda environ, start_response: [], tapes.Registry(), prefix="tapes")
