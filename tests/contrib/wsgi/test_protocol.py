"""A WSGI application and its server see what they would see without the adapter (PEP 3333)."""

from __future__ import annotations

import io
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest
import webtest
import webtest.lint

from tapes.contrib.wsgi import TapesMiddleware
from tests.contrib.recorded import active, counts
from tests.contrib.wsgi.server import call, serving

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


ANSWERS_HEAD = ("no_content", "reads")  # the others break the protocol without the adapter


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name in APPS for m in ("GET", "HEAD", "POST") if m != "HEAD" or name in ANSWERS_HEAD],
)
def test_the_protocol_is_kept_to_the_letter(registry, name, method):
    """wsgiref's validator and webtest's lint accept both sides of the middleware; answers are the same."""
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


def test_a_body_has_a_length_if_it_had_one(registry):
    """A body with a length keeps it, as servers make a Content-Length of it; others have none."""
    assert len(call(TapesMiddleware(serving([b"a", b"b"]), registry))) == 2
    with pytest.raises(TypeError):
        len(call(TapesMiddleware(serving(iter([b"a"])), registry)))


def test_what_the_servers_file_wrapper_made_reaches_the_server(registry):
    """The server gets the object that its file wrapper made; the request ends with that object's close()."""
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


def test_the_answer_may_start_late(registry):
    """A generator starts the answer when the server asks for its first piece, and not before."""
    started = []
    environ = {"wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    result = TapesMiddleware(generator, registry)(environ, lambda *args: started.append(args))
    assert not started
    assert next(iter(result)) == b"a"
    assert started == [("200 OK", [("Content-Type", "text/plain")])]


def test_start_response_gets_what_the_application_gave(registry):
    """The server gets the same arguments, exc_info too, and its exception reaches the application."""
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
    """A Content-Length of 5,000 digits, or of no digits, breaks no request and leaves none active."""
    app = TapesMiddleware(serving([b"x"]), registry, body_sizes=True, labels=lambda environ: {"a": "b"})
    for length in ("9" * 5000, "-1", "x", "٣", ""):
        assert b"".join(call(app, CONTENT_LENGTH=length)) == b"x"
    assert active(registry) == 0
    labels = {"method": "GET", "route": "<unmatched>"}
    sizes = registry.snapshot().get("http.server.request.body.size", **labels)
    assert (sizes.count, sizes.sum) == (5, 3)  # an Arabic three is a three


@pytest.mark.parametrize("body", [None, b"raw", "text"], ids=repr)
def test_what_is_no_body_is_the_servers_to_refuse(registry, body):
    """``None``, bytes and text instead of a body reach the server unchanged."""
    assert call(TapesMiddleware(serving(body), registry)) is body
    assert active(registry) == 0


def test_pieces_that_are_no_bytes_are_the_servers_to_refuse(registry):
    """Pieces of a body that are not bytes reach the server unchanged."""
    assert list(call(TapesMiddleware(serving([None, 1, b"x"]), registry))) == [None, 1, b"x"]


def test_granian_gets_its_list(registry):
    """Granian gets the list itself, which it sends at once with a length."""
    body = [b"a", b"b"]
    assert call(TapesMiddleware(serving(body), registry), SERVER_SOFTWARE="Granian") is body
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}
