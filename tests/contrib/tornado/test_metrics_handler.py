"""How Tornado answers the metrics, with instrument() and with a MetricsHandler alone."""

from __future__ import annotations

import json

import pytest
from tornado import web

from tapes.contrib.tornado import MetricsHandler
from tests.contrib.recorded import ACTIVE
from tests.contrib.tornado.handlers import app
from tests.contrib.tornado.server import fetching, serving


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_answers_have_the_headers_of_the_metrics_and_no_others(registry, path):
    """There is no ETag and so never a 304, and a POST gets its 405 though the application checks cookies."""
    got, post = fetching(app(registry, settings={"xsrf_cookies": True}), ("GET", path), ("POST", path))
    assert (got.code, post.code) == (200, 405)
    assert set(got.headers) - {"Connection"} == {
        "Server", "Date", "Content-Type", "Vary", "Cache-Control", "Content-Length",
    }  # fmt: skip

    async def scenario(client):
        assert (await client.fetch(path, headers={"If-None-Match": "*"})).code == 200

    serving(app(registry), scenario)


def test_a_metrics_handler_works_alone(registry, monkeypatch):
    """A MetricsHandler answers without instrument(), from its own registry, behind its guard or the token."""
    rules = [
        ("/metrics", MetricsHandler, {"registry": registry}),
        (
            "/guarded",
            MetricsHandler,
            {"registry": registry, "guard": lambda request: "X-Me" in request.headers},
        ),
        ("/default", MetricsHandler),
    ]

    async def scenario(client):
        registry.counter("jobs").increment()
        assert json.loads((await client.fetch("/metrics")).body)["jobs"]["value"] == 1
        assert (await client.fetch("/metrics", "HEAD")).code == 200
        assert (await client.fetch("/metrics", "DELETE")).code == 405
        assert (await client.fetch("/guarded")).code == 403
        assert (await client.fetch("/guarded", headers={"X-Me": "1"})).code == 200
        assert (await client.fetch("/default")).code == 200
        monkeypatch.setenv("TAPES_METRICS_TOKEN", "secret")
        refused = await client.fetch("/metrics")
        assert (refused.code, refused.headers["WWW-Authenticate"]) == (401, 'Bearer realm="metrics"')
        assert (await client.fetch("/metrics", headers={"Authorization": "Bearer secret"})).code == 200
        assert (await client.fetch("/guarded", headers={"X-Me": "1"})).code == 200

    serving(web.Application(rules), scenario)
    assert ACTIVE not in {family.name for family in registry.snapshot()}
