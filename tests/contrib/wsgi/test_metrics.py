"""How the metrics of a WSGI application depend on what the server reports, and on TAPES_DISABLED."""

from __future__ import annotations

import pytest

from tapes.contrib.wsgi import TapesMiddleware
from tests.contrib.wsgi.server import ask, call, serving


@pytest.mark.parametrize("may_start", ["0", "1"])
def test_a_process_that_can_not_see_the_others_answers_503(registry, monkeypatch, may_start):
    """If wsgi.multiprocess alone shows that there are others, the answer names what to set."""
    monkeypatch.setenv("TAPES_AUTOSTART", may_start)
    app = TapesMiddleware(serving([b"x"]), registry)
    status, _, body = ask(app, "/metrics", **{"wsgi.multiprocess": True})
    assert status == 503
    assert b"TAPES_ADDR" in body


def test_turned_off_the_server_gets_the_body_of_the_application(registry, monkeypatch):
    """With ``TAPES_DISABLED=1`` the application is called directly, and its own body is returned."""
    monkeypatch.setenv("TAPES_DISABLED", "1")
    body = [b"a"]
    assert call(TapesMiddleware(serving(body), registry)) is body
