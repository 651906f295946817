"""A small application of Flask, and how to ask it."""

from __future__ import annotations

import flask
from werkzeug.test import Client


def small_app(name="shop"):
    app = flask.Flask(name)
    app.add_url_rule("/users/<user>", "user", lambda user: user)
    return app


def ask(app, path, **more):
    """Return the status of one answer, which is read to its end."""
    return Client(app).open(path, buffered=True, **more).status_code


def answers(environ, start_response):
    """Answer with the status that the path names."""
    start_response(environ["PATH_INFO"][1:] + " X", [])
    return [b""]
