"""Flask: the extension, route templates of all kinds, and views that are left out."""

from __future__ import annotations

import flask
import flask.views
import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client as WerkzeugClient

import tapes
from tapes.contrib import wsgi
from tapes.contrib.flask import Tapes, TapesMiddleware
from tapes.errors import InvalidArgument
from tests.contrib.recorded import active, counts
from tests.contrib.wsgi.shop import ask, small_app


def test_one_extension_for_many_applications(registry):
    """One extension serves several applications by init_app(); a second call for one changes nothing."""
    extension = Tapes(registry=registry, metrics_path="/m")
    one, two = small_app(), small_app()
    for app in (one, two, one):
        extension.init_app(app)
        assert app.extensions["tapes"] is extension
    assert [ask(app, "/users/7") for app in (one, two)] == [200, 200]
    assert [ask(app, "/m") for app in (one, two)] == [200, 200]
    assert counts(registry) == {("GET", "/users/<user>", "200"): 2}


def test_two_applications_with_registries_of_their_own():
    """Two applications with a registry each record their own requests only."""
    registries = tapes.Registry(), tapes.Registry()
    apps = [small_app() for _ in registries]
    for app, registry in zip(apps, registries):
        Tapes(app, registry)
    assert ask(apps[0], "/users/7") == 200
    assert [sum(counts(registry).values()) for registry in registries] == [1, 0]


def test_views_are_left_out_by_a_decorator(registry):
    """An excluded view, in a blueprint or a class of views too, is active while it runs and not timed."""
    app, blueprint = small_app(), flask.Blueprint("b", "b")
    extension = Tapes(app, registry)

    @app.get("/below")
    @extension.exclude
    def below():
        assert active(registry) == 1
        return "x"

    @extension.exclude
    @app.get("/above")
    def above():
        return "x"

    @blueprint.get("/blue")
    @extension.exclude
    def blue():
        return "x"

    @extension.exclude
    class View(flask.views.MethodView):
        def get(self):
            return "x"

    app.register_blueprint(blueprint, url_prefix="/sea")
    app.add_url_rule("/class", view_func=View.as_view("class"))
    assert [ask(app, path) for path in ("/below", "/above", "/sea/blue", "/class")] == [200] * 4
    assert counts(registry) == {}
    assert active(registry) == 0
    assert ask(app, "/users/7") == 200
    assert counts(registry) == {("GET", "/users/<user>", "200"): 1}


def test_templates_of_views_and_blueprints(registry):
    """A view that aborts or fails keeps its template, and so does a view of a blueprint."""
    app, admin = flask.Flask("shop"), flask.Blueprint("admin", "admin", url_prefix="/admin")

    @app.route("/users/<int:number>")
    def user(number):
        flask.abort(404)

    @app.route("/broken")
    def broken():
        raise RuntimeError("broken")

    admin.add_url_rule("/things/<path:name>", "things", lambda name: name)
    app.register_blueprint(admin)
    app.wsgi_app = TapesMiddleware(app.wsgi_app, registry)
    for path, status in (("/users/404", 404), ("/broken", 500), ("/admin/things/a/b/c", 200)):
        assert ask(app, path) == status
    assert counts(registry) == {
        ("GET", "/users/<int:number>", "404"): 1,
        ("GET", "/broken", "500"): 1,
        ("GET", "/admin/things/<path:name>", "200"): 1,
    }


def test_both_import_paths_are_the_same():
    """tapes.contrib.flask exports the TapesMiddleware of tapes.contrib.wsgi."""
    assert TapesMiddleware is wsgi.TapesMiddleware


def test_templates_of_nested_blueprints_and_hosts(registry):
    """Nested blueprints have their full template, for every host that matches."""
    app = flask.Flask("shop", host_matching=True, static_host="static.example")
    outer, inner = flask.Blueprint("outer", "outer"), flask.Blueprint("inner", "inner")
    inner.add_url_rule("/<int:number>", "n", lambda shop, number: "x", host="<shop>.example")
    outer.register_blueprint(inner, url_prefix="/inner")
    app.register_blueprint(outer, url_prefix="/outer")
    Tapes(app, registry)
    for host in ("a.example", "b.example"):
        assert ask(app, "/outer/inner/7", base_url=f"http://{host}") == 200
    assert ask(app, "/outer/inner/7", base_url="http://elsewhere") == 404
    assert counts(registry) == {
        ("GET", "/outer/inner/<int:number>", "200"): 2,
        ("GET", "<unmatched>", "404"): 1,
    }


def test_templates_below_a_dispatcher(registry):
    """The mount of an application is part of its templates; a raw path is not."""
    app = TapesMiddleware(DispatcherMiddleware(small_app(), {"/api": small_app("api")}), registry)
    for path in ("/users/7", "/api/users/7", "/api/nothing"):
        ask(app, path)
    assert counts(registry) == {
        ("GET", "/users/<user>", "200"): 1,
        ("GET", "/api/users/<user>", "200"): 1,
        ("GET", "<unmatched>", "404"): 1,
    }


@pytest.mark.parametrize("wrap", ["extension", "middleware"])
def test_exceptions_that_leave_flask_keep_their_route(registry, wrap):
    """An exception that leaves Flask, as in debug mode, is recorded with its route."""
    app = small_app()
    app.testing = True

    @app.route("/broken/<thing>")
    def broken(thing):
        raise RuntimeError("broken")

    @app.route("/quiet")
    @Tapes.exclude
    def quiet():
        raise RuntimeError("quietly")

    if wrap == "extension":
        Tapes(app, registry)
    else:
        app.wsgi_app = TapesMiddleware(app.wsgi_app, registry)
    with pytest.raises(RuntimeError, match="broken"):
        ask(app, "/broken/1")
    assert counts(registry) == {("GET", "/broken/<thing>", "500"): 1}
    if wrap == "extension":
        with pytest.raises(RuntimeError, match="quietly"):
            ask(app, "/quiet")
        assert counts(registry) == {("GET", "/broken/<thing>", "500"): 1}
    assert active(registry) == 0


def test_labels_are_made_in_the_context_of_the_request(registry):
    """The callable for labels can use flask.g and flask.request."""
    app = small_app()

    @app.before_request
    def identify():
        flask.g.tenant = flask.request.headers["X-Tenant"]

    Tapes(app, registry, labels=lambda environ: {"tenant": flask.g.tenant})
    assert ask(app, "/users/7", headers={"X-Tenant": "acme"}) == 200
    (series,) = registry.snapshot().series("http.server.request.duration")
    assert dict(series.labels)["tenant"] == "acme"


def test_files_are_sent_by_the_server(registry, tmp_path):
    """send_file() returns what the server's file wrapper made, and the server closes it."""
    (tmp_path / "file.txt").write_text("text")
    app = small_app()
    app.add_url_rule("/file", "file", lambda: flask.send_file(tmp_path / "file.txt"))
    Tapes(app, registry)
    made = []

    def wrapper(file, size=1):
        made.append(file)
        return file

    client = WerkzeugClient(app)
    answer = client.get("/file", environ_overrides={"wsgi.file_wrapper": wrapper}, buffered=True)
    assert answer.text == "text"
    assert made
    assert made[0].closed
    assert counts(registry) == {("GET", "/file", "200"): 1}


def test_what_is_no_flask_application_says_so():
    """The extension refuses other applications than those of Flask, and names TapesMiddleware."""
    with pytest.raises(InvalidArgument, match=r"flask\.Flask.*TapesMiddleware"):
        Tapes(lambda environ, start_response: [])
