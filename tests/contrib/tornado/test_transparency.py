"""An application of Tornado and its clients see what they would see without the adapter."""

from __future__ import annotations

import gc
import logging
import re
import sys
import weakref

import pytest
from tornado import web

from tapes.contrib.tornado import MeteredHandler, instrument
from tapes.errors import InvalidArgument
from tests.contrib.recorded import active, counts
from tests.contrib.tornado.handlers import RULES, app
from tests.contrib.tornado.server import serving, until
from tests.processes import run_python

PATHS = ["/", "/later", "/broken", "/refusing", "/finishing", "/chunks", "/broken-later", "/moved", "/none",
         "/cancelled", "/unmade", "/bad-header", "/users/1"]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "BREW"])
@pytest.mark.parametrize("path", PATHS)
def test_the_application_sees_what_it_would_see_without(registry, caplog, method, path):
    """With the adapter, clients get the same bytes and the log has the same lines."""
    caplog.set_level(logging.INFO)
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
    )
    seen = []
    for application in (web.Application(RULES), app(registry)):
        caplog.clear()
        answers = []

        async def scenario(client, answers=answers):
            answers.append(await client.raw(request))

        serving(application, scenario)
        logs = [
            (record.name, re.sub(r"[\d.]+ms|0x\w+|\d+\)", "", record.message)) for record in caplog.records
        ]
        seen.append((re.sub(rb"Date: [^\r]*", b"", answers[0]), [log for log in logs if log[0] != "asyncio"]))
    assert seen[0] == seen[1]
    assert active(registry) == 0


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="nothing is freed at once")
@pytest.mark.parametrize("body_sizes", [False, True])
@pytest.mark.parametrize("path", ["/", "/later", "/chunks", "/none", "/metered"])
def test_no_cycle_is_left(registry, path, body_sizes):
    """A request is freed without the garbage collector, as it is without the adapter."""
    requests = []

    class Noting(web.Application):
        def find_handler(self, request, **kwargs):
            requests.append(weakref.ref(request))
            return super().find_handler(request, **kwargs)

    class CyclesEndpoint(MeteredHandler):
        async def get(self):
            self.write("metered")

    application = Noting([*RULES, ("/metered", CyclesEndpoint)])
    instrument(application, registry, body_sizes=body_sizes)

    async def scenario(client):
        _, writer = await client.connect(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() * 3)
        await until(lambda: sum(counts(registry).values()) == 3, "all are answered")
        writer.close()
        await until(lambda: not any(request() for request in requests), "all are freed")

    gc.collect()
    gc.disable()
    try:
        serving(application, scenario)
    finally:
        gc.enable()
    assert len(requests) == 3


def test_options_that_can_not_be_used(registry):
    """An application that is instrumented with an invalid option stays as it was."""
    for options in ({"metrics_path": "metrics"}, {"guard": 1}, {"route": "x"}, {"exclude": ["x"]}):
        application = web.Application([])
        with pytest.raises(InvalidArgument):
            instrument(application, registry, **options)
        assert "find_handler" not in vars(application)


def test_without_tornado_it_says_what_to_install(tmp_path):
    """Without Tornado, importing the adapter raises MissingExtra, which names the extra to install."""
    done = run_python(
        """
import sys
sys.modules["tornado"] = None
import tapes
try:
    import tapes.contrib.tornado
except tapes.errors.MissingExtra as error:
    print(error)
""",
        cwd=tmp_path,
    )
    assert "pip install 'tapes[tornado]'" in done.stdout, done.stderr
