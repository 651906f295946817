"""How ASGI requests for the metrics are read: header lines, tokens, root paths, and the event loop."""

from __future__ import annotations

import threading

import anyio
import pytest

from tapes.contrib.asgi import TapesMiddleware
from tapes.session import LocalSession
from tests.contrib.asgi.server import BACKENDS, Answer, Connected, ask, plain, receiving, scope_of
from tests.contrib.asgi.shop import shop


@pytest.mark.parametrize("kinds", [(b"image/png", b"text/plain"), (b"text/plain", b"image/png")])
def test_several_accept_lines_are_one_list(registry, kinds):
    """Several ``Accept`` lines count as one list, so their order does not matter."""
    app = TapesMiddleware(plain, registry)
    answer = ask(app, "/metrics", headers=[(b"accept", kind) for kind in kinds])
    assert answer.headers[b"content-type"].startswith(b"text/plain")


def test_only_the_first_1000_header_lines_are_looked_at(registry):
    """A line after the first 1,000 is ignored: a request of many lines costs no more than one of 1,000."""
    app = TapesMiddleware(plain, registry)
    for lines, kind in ((999, b"text/plain"), (1000, b"application/json")):
        answer = ask(app, "/metrics", headers=[(b"a", b"b")] * lines + [(b"accept", b"text/plain")])
        assert answer.headers[b"content-type"].partition(b";")[0] == kind


def test_metrics_below_a_root_path(registry):
    """The metrics are found whether a server leaves the root_path in the path or not, with any slash."""
    app = TapesMiddleware(shop(), registry)
    for path in ("/metrics", "/behind/metrics"):
        for root_path in ("/behind", "/behind/"):
            assert ask(app, path, root_path=root_path).status == 200
    for root_path in ("/", "/m"):
        assert ask(app, "/metrics", root_path=root_path).status == 200


def test_a_token_need_not_be_ascii_but_not_empty(registry, monkeypatch):
    """The token is compared as bytes, without a line's end; an empty token refuses every client."""
    app = TapesMiddleware(plain, registry)
    monkeypatch.setenv("TAPES_METRICS_TOKEN", "grün\n")
    assert ask(app, "/metrics", headers=[(b"authorization", "Bearer grün".encode())]).status == 200
    assert ask(app, "/metrics", headers=[(b"Authorization", b"Bearer gr???n")]).status == 401
    monkeypatch.setenv("TAPES_METRICS_TOKEN", "")
    assert ask(app, "/metrics", headers=[(b"authorization", b"Bearer ")]).status == 403


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_event_loop_goes_on_while_the_aggregator_is_waited_for(registry, backend):
    """While a reader waits for the aggregator, the event loop answers other requests."""
    asked, let_go = threading.Event(), threading.Event()

    class Slow(Connected):
        def render(self, form, write):
            asked.set()
            assert let_go.wait(10)
            return b"{}"

    registry.use(Slow(registry))
    app = TapesMiddleware(plain, registry)

    async def main():
        async with anyio.create_task_group() as tasks:
            reader = Answer()
            tasks.start_soon(app, scope_of("/metrics"), receiving(), reader.send)
            while not asked.is_set():
                await anyio.sleep(0.001)
            answer = Answer()
            await app(scope_of(), receiving(), answer.send)
            assert answer.body == b"plain"
            assert not reader.messages
            let_go.set()
        assert reader.body == b"{}"

    try:
        anyio.run(main, backend=backend)
    finally:
        let_go.set()
        registry.use(LocalSession(registry))
