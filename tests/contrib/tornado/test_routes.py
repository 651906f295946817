"""Which route a request of Tornado is counted under."""

from __future__ import annotations

from tornado import routing, web, wsgi
from tornado.httputil import HTTPHeaders, HTTPServerConnectionDelegate, ResponseStartLine

import tapes
from tapes.contrib.tornado import UNMATCHED, instrument
from tests.contrib.recorded import active, counts
from tests.contrib.tornado.handlers import Hello, Later, Other, app
from tests.contrib.tornado.server import fetching, serving


def test_requests_are_counted_by_pattern(registry):
    """Requests have the pattern of their rule and never a raw path, for methods without a handler too."""
    requests = [("GET", f"/{kind}/{number}") for number in range(5) for kind in ("users", "nothing")]
    requests += [
        (f"BREW{number}", f"/{kind}/{number}") for number in range(3) for kind in ("users", "nothing")
    ]
    requests += [("POST", "/users/1"), ("PUT", "/users/1"), ("HEAD", "/users/1"), ("GET", "/anchored/x?y=1")]
    fetching(app(registry), *requests)
    assert counts(registry) == {
        ("GET", r"/users/(\d+)", "200"): 5,
        ("GET", UNMATCHED, "404"): 5,
        ("_OTHER", r"/users/(\d+)", "405"): 3,
        ("_OTHER", UNMATCHED, "405"): 3,
        ("POST", r"/users/(\d+)", "200"): 1,
        ("PUT", r"/users/(\d+)", "405"): 1,
        ("HEAD", r"/users/(\d+)", "405"): 1,
        ("GET", r"/anchored/(?P<name>\w+)", "200"): 1,
    }
    assert active(registry) == 0


class Hosts(routing.Matcher):
    def match(self, request):
        return {} if "X-Special" in request.headers else None


def test_host_rules_are_told_apart(registry):
    """If one class has many rules, the route is the rule that matched, also if it was added later."""
    application = app(registry, [(r"/a/(.*)", Hello), (r"/(.*)", Hello)])

    async def scenario(client):
        await client.fetch("/a/1")
        await client.fetch("/b/1")
        await client.fetch("/a/1", headers={"Host": "else.where"})
        application.add_handlers(r"else\.where", [(r"/(a|b)/\d", Hello), (r"/only", Other)])
        for path in ("/a/1", "/only", "/c"):
            await client.fetch(path, headers={"Host": "else.where"})
        await client.fetch("/a/1")

    serving(application, scenario)
    assert counts(registry) == {
        ("GET", "/a/(.*)", "200"): 3,
        ("GET", "/(.*)", "200"): 2,
        ("GET", r"/(a|b)/\d", "200"): 1,
        ("GET", "/only", "200"): 1,
    }


class Delegate(HTTPServerConnectionDelegate):
    def start_request(self, server_conn, request_conn):
        return Message(request_conn)


class Message(routing._DefaultMessageDelegate):
    """Answers 404 itself."""


class Choosing(routing.Router):
    """A router of the user's, which knows its handlers."""

    def __init__(self, application):
        self.application = application

    def find_handler(self, request, **kwargs):
        if request.path.endswith("/none"):
            return None
        return self.application.get_handler_delegate(request, Later)


def answer_204(request):
    request.connection.write_headers(ResponseStartLine("", 204, "No Content"), HTTPHeaders())
    request.connection.finish()


def wsgi_app(environ, start_response):
    start_response("202 Accepted", [])
    return [environ["PATH_INFO"].encode()]


def test_all_that_a_rule_can_lead_to(registry):
    """Nested rules, routers, applications, callables, delegates and WSGI are named by the deepest pattern."""
    inner = web.Application([(r"/inner/(\d+)", Hello)])
    application = app(registry, [])
    application.wildcard_router.add_rules([
        (routing.HostMatches(r"127\.0\.0\.1"), [(r"/nested/(\w+)", Hello)]),
        (r"/inner.*", inner),
        (r"/router.*", routing.RuleRouter([(r"/router/app/.*", answer_204)])),
        (r"/own.*", Choosing(application)),
        (r"/call/.*", answer_204),
        (r"/delegate", Delegate()),
        (r"/wsgi/.*", wsgi.WSGIContainer(wsgi_app)),
        (r"/fallback/.*", web.FallbackHandler, {"fallback": wsgi.WSGIContainer(wsgi_app)}),
        (Hosts(), Other),
        (r"/gone", web.ErrorHandler, {"status_code": 410}),
        (r"/any/.*", [(routing.AnyMatches(), Other)]),
    ])  # fmt: skip

    async def scenario(client):
        for path in ("/nested/a", "/inner/1", "/inner/x", "/router/app/1", "/router/x", "/own/1", "/own/none",
                     "/call/1", "/delegate", "/wsgi/1", "/fallback/1", "/gone", "/any/1"):  # fmt: skip
            await client.fetch(path)
        await client.fetch("/special", headers={"X-Special": "1"})

    serving(application, scenario)
    assert counts(registry) == {
        ("GET", r"/nested/(\w+)", "200"): 1,
        ("GET", r"/inner/(\d+)", "200"): 1,
        ("GET", "/router/app/.*", "204"): 1,
        ("GET", "/own.*", "200"): 1,
        ("GET", "/call/.*", "204"): 1,
        ("GET", "/delegate", "404"): 1,
        ("GET", "/wsgi/.*", "202"): 1,
        ("GET", "/fallback/.*", "202"): 1,
        ("GET", "Other", "200"): 1,
        ("GET", "/gone", "410"): 1,
        ("GET", "/any/.*", "200"): 1,
        ("GET", UNMATCHED, "404"): 3,
    }
    assert active(registry) == 0


def test_a_default_handler_is_no_route(registry):
    """A request that the default handler answers is unmatched."""
    settings = {"default_handler_class": Other}
    fetching(app(registry, [(r"/a", Hello)], settings), ("GET", "/a"), ("GET", "/b"))
    assert counts(registry) == {("GET", "/a", "200"): 1, ("GET", UNMATCHED, "200"): 1}


def test_instrumenting_twice_measures_once(registry):
    """An application that is instrumented again, or within another one, counts each request once."""
    inner = app(registry, [(r"/inner/(\d+)", Hello)])
    back = app(registry, [(r"/back/(\d+)", Hello)])
    rules = [(r"/inner.*", inner), (r"/", Hello), (r".*", web.FallbackHandler, {"fallback": back})]
    application = app(registry, rules)
    for again in (registry, tapes.Registry()):
        assert instrument(application, again) is application
    fetching(application, ("GET", "/"), ("GET", "/inner/1"), ("GET", "/back/1"))
    assert list(again.snapshot()) == []
    assert counts(registry) == {
        ("GET", "/", "200"): 1,
        ("GET", r"/inner/(\d+)", "200"): 1,
        ("GET", r"/back/(\d+)", "200"): 1,
    }
    assert active(registry) == 0


def test_two_registries_both_measure(registry):
    """Two applications within each other, with a registry each, both count the request."""
    outer = tapes.Registry()
    inner = app(registry, [(r"/inner/(\d+)", Hello)])
    fetching(app(outer, [(r"/inner.*", inner)]), ("GET", "/inner/1"))
    assert counts(registry) == counts(outer) == {("GET", r"/inner/(\d+)", "200"): 1}
    assert active(registry) == active(outer) == 0
