"""What all adapters promise, tested on WSGI, Flask, ASGI (asyncio and trio) and Tornado.

What only one of them promises is tested in the directory of that one.
"""

from __future__ import annotations

import inspect
import json

import pytest

import tapes
from tapes.contrib.options import DEFAULTS, Options
from tapes.errors import AggregatorUnavailable, InvalidArgument, InvalidCall, InvalidLabel, InvalidName
from tapes.session import LocalSession, Session
from tests.contrib.harnesses import HARNESSES, Broken
from tests.contrib.recorded import DURATION, active, counts


@pytest.fixture(params=HARNESSES)
def harness(request, clock):
    return HARNESSES[request.param](clock)


def series_of(registry, name=DURATION):
    return {tuple(sorted(dict(series.labels).items())): series for series in registry.snapshot().series(name)}


def labels_of(registry, label):
    return {dict(series.labels).get(label) for series in registry.snapshot().series(DURATION)}


# What is recorded.


def test_requests_are_counted_by_method_template_and_status(harness, registry):
    """A series has the route's template and never a raw path; all requests without a route share one."""
    app = harness.app(registry)
    for number in range(5):
        harness.ask(app, f"/users/{number}?page={number}")
        assert harness.ask(app, f"/nothing/{number}").status == 404
    harness.ask(app, "/users/1", "POST", b"12345")
    assert harness.ask(app, "/users/1", "HEAD").body == b""
    harness.ask(app, "/gone")
    assert counts(registry) == {
        ("GET", harness.user, "200"): 5,
        ("POST", harness.user, "200"): 1,
        ("HEAD", harness.user, "200"): 1,
        ("GET", "<unmatched>", "404"): 5,
        ("GET", "/gone", "410"): 1,
    }
    assert active(registry) == 0


def test_a_request_is_active_while_it_is_answered(harness, registry):
    """The gauge of active requests is 1 while the application answers one request, and 0 after it."""
    seen = []
    harness.during = lambda: seen.append((active(registry), counts(registry)))
    harness.ask(harness.app(registry), "/users/7")
    assert seen == [(1, {})]
    assert active(registry) == 0


def test_any_number_of_paths_and_methods_makes_two_series(harness, registry):
    """Clients can't make series: unknown paths share one, and methods that they invent share another."""
    app = harness.app(registry)
    harness.ask_all(app, [(f"/{number}", "GET") for number in range(harness.many)])
    harness.ask_all(app, [("/users/7", f"M{number}") for number in range(harness.many // 20)])
    assert counts(registry) == {
        ("GET", "<unmatched>", "404"): harness.many,
        ("_OTHER", harness.unknown_method, "405"): harness.many // 20,
    }
    assert active(registry) == 0


def test_a_stream_is_timed_to_its_last_byte(harness, registry):
    """An answer that takes 1 s to stream is recorded as 1 s, whenever the application returned."""
    assert harness.ask(harness.app(registry), "/stream").body == b"xxxx"
    (series,) = registry.snapshot().series(DURATION)
    assert (series.count, series.sum) == (1, 1.0)


def test_a_client_that_goes_away_in_the_middle_of_an_answer_is_a_499(harness, registry):
    """The request is counted once, with its route and the status 499, and is no longer active."""
    harness.leave(harness.app(registry), registry)
    assert counts(registry) == {("GET", "/endless", "499"): 1}
    assert active(registry) == 0


@pytest.mark.parametrize("path", ["/broken", "/cut"])
def test_an_exception_is_recorded_as_one_500_and_raised_again(harness, registry, path):
    """The same exception reaches the server, before the answer or within it, unless the framework answers."""
    app = harness.app(registry)
    if harness.raises:
        with pytest.raises(Broken) as caught:
            harness.ask(app, path)
        assert caught.value is harness.error
    elif path == "/broken":
        assert harness.ask(app, path).status == 500
    else:
        harness.ask(app, path)
    assert counts(registry) == {("GET", path, "500"): 1}
    assert active(registry) == 0


def test_the_default_registry_is_the_default(harness):
    """An adapter without a registry records into the default registry."""
    harness.ask(harness.app(), "/gone")
    assert ("GET", "/gone", "410") in counts(tapes.default_registry)


# The path of the metrics.


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_metrics_are_answered_with_and_without_a_slash(harness, registry, path):
    """The answer is JSON by default, is not cached and not measured; only GET and HEAD are allowed."""
    app = harness.app(registry)
    harness.ask(app, "/users/7")
    answer = harness.ask(app, path)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["vary"] == "Accept"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-length"] == str(len(answer.body))
    durations = json.loads(answer.body)["http"]["server"]["request"]["duration"]
    assert [series["count"] for series in durations.values()] == [1]
    head = harness.ask(app, path, "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) > 100
    for method in ("POST", "BREW"):
        refused = harness.ask(app, path, method)
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")
        assert refused.body == b"The metrics can only be read.\n"
    assert counts(registry) == {("GET", harness.user, "200"): 1}


def test_metrics_are_negotiated(harness, registry):
    """``Accept`` chooses the format, and ``?format=`` wins over it; an unknown format is a 400."""
    app = harness.app(registry)
    harness.ask(app, "/gone")
    text = harness.ask(app, "/metrics", accept="text/plain")
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    line = b'http_server_request_duration_seconds_count{method="GET",route="/gone",status="410"} 1'
    assert line in text.body
    openmetrics = harness.ask(app, "/metrics?format=openmetrics", accept="text/plain")
    assert openmetrics.body.endswith(b"# EOF\n")
    assert harness.ask(app, "/metrics?format=yaml").status == 400


def test_the_path_of_the_metrics_can_be_changed_or_left_to_the_application(harness, registry):
    """With another path or with ``None``, requests for /metrics reach the application and are measured."""
    for path in ("/internal/metrics", None):
        app = harness.app(registry, metrics_path=path)
        assert harness.ask(app, "/metrics").status == 404
        assert harness.ask(app, "/internal/metrics").status == (200 if path else 404)
    assert counts(registry) == {("GET", "<unmatched>", "404"): 3}


def test_a_guard_decides_who_reads_the_metrics(harness, registry):
    """Clients that the guard refuses get 403; requests for other paths don't ask it."""
    app = harness.app(registry, guard=lambda source: harness.header_of(source, "X-Token") == "secret"
                      or harness.header_of(source, "x-token") == "secret")  # fmt: skip
    assert harness.ask(app, "/metrics").status == 403
    assert harness.ask(app, "/metrics", x_token="wrong").status == 403
    assert harness.ask(app, "/metrics", x_token="secret").status == 200
    assert harness.ask(app, "/users/7").status == 200


def test_a_guard_may_be_asynchronous_where_there_is_an_event_loop(harness, registry, caplog):
    """It is awaited under ASGI and Tornado. Under WSGI it lets no client read, and that is logged."""

    async def guard(source):
        return harness.header_of(source, "x-token") == "secret"

    async def forgetful(source):
        pass

    app = harness.app(registry, guard=guard)
    assert harness.ask(app, "/metrics").status == 403
    assert harness.ask(app, "/metrics", x_token="secret").status == (200 if harness.can_await else 403)
    assert ("awaited" in caplog.text) is not harness.can_await
    assert harness.ask(harness.app(registry, guard=forgetful), "/metrics").status == 403


def test_a_guard_that_fails_lets_no_client_read(harness, registry, caplog):
    """A guard that raises, in a coroutine too, or that returns nothing refuses every client."""

    async def failing(source):
        raise RuntimeError

    for guard in (lambda source: 1 / 0, failing, lambda source: None):
        assert harness.ask(harness.app(registry, guard=guard), "/metrics").status == 403
    assert "the guard of the metrics failed" in caplog.text


def test_the_token_of_the_environment_protects_the_metrics(harness, registry, monkeypatch):
    """Without the token a client gets 401; a guard of the application replaces the token."""
    monkeypatch.setenv("TAPES_METRICS_TOKEN", "secret")
    app = harness.app(registry)
    refused = harness.ask(app, "/metrics")
    assert (refused.status, refused.headers["www-authenticate"]) == (401, 'Bearer realm="metrics"')
    assert harness.ask(app, "/metrics", authorization="Bearer wrong").status == 401
    assert harness.ask(app, "/metrics", authorization="bearer secret").status == 200
    guarded = harness.app(registry, guard=lambda source: True)
    assert harness.ask(guarded, "/metrics").status == 200


def test_a_process_that_can_not_join_its_service_answers_503(harness, registry, monkeypatch):
    """It names what to set, and never answers with its own share; other requests are answered."""
    monkeypatch.setenv("TAPES_AUTOSTART", "0")
    monkeypatch.setattr("tornado.process._task_id", 0)  # a worker of several
    app = harness.app(registry)
    assert harness.ask(app, "/users/7").status == 200
    answer = harness.ask(app, "/metrics")
    assert answer.status == 503
    assert b"TAPES_ADDR" in answer.body


def test_an_aggregator_that_does_not_answer_is_a_503(harness, registry):
    """The answer is a sentence, and never the share of this process."""

    class Unavailable(Session):
        is_connected = True

        def render(self, form, write):
            raise AggregatorUnavailable("the aggregator did not answer in time")

    app = harness.app(registry)
    registry.use(Unavailable(registry))
    try:
        answer = harness.ask(app, "/metrics")
    finally:
        registry.use(LocalSession(registry))
    assert (answer.status, answer.body) == (503, b"the aggregator did not answer in time.\n")


def test_turned_off_nothing_is_measured(harness, registry, monkeypatch):
    """With ``TAPES_DISABLED=1`` the application answers as without the adapter, and the metrics are a 503."""
    monkeypatch.setenv("TAPES_DISABLED", "1")
    app = harness.app(registry)
    assert harness.ask(app, "/users/7").body == b"hello"
    answer = harness.ask(app, "/metrics")
    assert answer.status == 503
    assert b"TAPES_DISABLED" in answer.body
    assert counts(registry) == {}


# Options.


def test_excluded_paths_are_not_measured(harness, registry):
    """A path is excluded with and without a slash, and "/*" at its end excludes all paths below it."""
    app = harness.app(registry, exclude=["/health", "/static/*", "/gon*"])
    for path in ("/health", "/health/", "/static/a", "/static/a/b", "/healthy", "/gone"):
        harness.ask(app, path)
    assert counts(registry) == {("GET", "/healthy", "200"): 1, ("GET", "/gone", "410"): 1}
    assert active(registry) == 0
    app = harness.app(tapes.Registry(), exclude="/health")
    assert harness.ask(app, "/health").body == b"hello"


def test_labels_are_added_to_each_request(harness, registry):
    """They are a mapping, or what a callable returns for a request; values of any type become text."""
    tenant = harness.app(registry, labels=lambda source: {"tenant": harness.path_of(source)[1:]})
    harness.ask(tenant, "/gone")
    assert labels_of(registry, "tenant") == {"gone"}
    other = tapes.Registry()
    for value in (True, 1, ["a"]):
        harness.ask(harness.app(other, labels={"l": value}), "/gone")
    assert labels_of(other, "l") == {"True", "1", "['a']"}


def test_labels_that_fail_leave_the_request_without_them(harness, registry, caplog):
    """The request is answered and counted without further labels, and the failure is logged once.

    A label that the adapter sets itself keeps the adapter's value.
    """
    for labels in (lambda source: 1 / 0, lambda source: {"a-b": 1}, lambda source: {"method": "x"}):
        app = harness.app(registry, labels=labels)
        for _ in range(3):
            assert harness.ask(app, "/users/7").body == b"hello"
    logged = [record.getMessage() for record in caplog.records if "labels" in record.getMessage()]
    assert [message.partition(" (")[0] for message in logged] == [
        "tapes: the callable for further labels failed",
        "tapes records requests without further labels",
    ]
    assert counts(registry) == {("GET", harness.user, "200"): 9}
    assert active(registry) == 0


def test_sizes_of_bodies_are_recorded_on_request(harness, registry):
    """With ``body_sizes`` the sizes of both bodies are recorded in bytes, without it they are not."""
    app = harness.app(registry, body_sizes=True)
    harness.ask(app, "/users/7", "POST", b"12345678")
    harness.ask(app, "/stream")
    snapshot = registry.snapshot()
    assert snapshot.get("http.server.request.body.size", method="POST", route=harness.user).sum == 8
    assert snapshot.get("http.server.response.body.size", method="POST", route=harness.user).sum == 5
    assert snapshot.get("http.server.request.body.size", method="GET", route="/stream").sum == 0
    assert snapshot.get("http.server.response.body.size", method="GET", route="/stream").sum == 4
    other = tapes.Registry()
    harness.ask(harness.app(other), "/users/7", "POST", b"12345678")
    assert not any("body.size" in family.name for family in other.snapshot())


def test_a_prefix_stands_before_the_names_of_all_metrics(harness, registry):
    """With ``prefix="shop"`` all metrics of the adapter begin with "shop."."""
    app = harness.app(registry, prefix="shop", body_sizes=True)
    harness.ask(app, "/users/7")
    names = {family.name for family in registry.snapshot()}
    assert {"shop." + DURATION, "shop.http.server.active_requests"} < names
    assert all(name.startswith("shop.") for name in names)


def test_a_callable_names_the_route(harness, registry, caplog):
    """``route`` wins over what the adapter finds. If it returns ``None`` or fails, the found route stays."""

    def route(source):
        return {"/gone": "/see", "/healthy": None}[harness.path_of(source)]

    app = harness.app(registry, route=route)
    for path in ("/gone", "/healthy", "/health"):
        harness.ask(app, path)
    assert counts(registry) == {
        ("GET", "/see", "410"): 1,
        ("GET", "/healthy", "200"): 1,
        ("GET", "/health", "200"): 1,
    }
    assert "the callable for routes failed" in caplog.text


def test_all_options_together(harness, registry):
    """An adapter takes all options at once, as a dictionary too, and the registry by position."""
    options: Options = {
        "metrics_path": "/m", "exclude": ["/health"], "labels": {"region": "eu"}, "body_sizes": True,
        "guard": lambda source: True, "prefix": "shop", "route": lambda source: "/one",
    }  # fmt: skip
    assert options.keys() == DEFAULTS.keys() == Options.__annotations__.keys()
    app = harness.app(registry, **options)
    assert harness.ask(app, "/m").status == 200
    for path in ("/health", "/gone"):
        harness.ask(app, path)
    labels = {"method": "GET", "route": "/one", "status": "410", "region": "eu"}
    assert list(series_of(registry, "shop." + DURATION)) == [tuple(sorted(labels.items()))]


@pytest.mark.parametrize(
    ("option", "value"),
    [("metrics_path", "metrics"), ("exclude", ["health"]), ("guard", "secret"), ("route", "/")],
)
def test_an_option_out_of_its_range_is_refused_when_the_adapter_is_made(harness, registry, option, value):
    """The error names the option and the value."""
    with pytest.raises(InvalidArgument, match=rf"^{option}: got ['\[]"):
        harness.app(registry, **{option: value})


def test_other_arguments_are_refused_when_the_adapter_is_made(harness, registry):
    """A registry that is none, a label's name that can't be used, and a prefix that is taken are errors."""
    with pytest.raises(InvalidArgument, match="registry"):
        harness.app("registry")
    with pytest.raises(InvalidLabel):
        harness.app(registry, labels={"a-b": 1})
    with pytest.raises(InvalidName, match=r"'tapes\.'"):
        harness.app(registry, prefix="tapes")


def test_an_option_that_does_not_exist_is_refused_by_name(harness, registry):
    """The error is a TypeError that names the option, all options, and the one that is nearest."""
    with pytest.raises(InvalidCall, match=r"got 'metric_path', .*exclude.*; did you mean 'metrics_path'\?"):
        harness.app(registry, metric_path="/m")
    with pytest.raises(TypeError, match="'xyz'"):
        harness.app(registry, xyz=1)


def test_the_signature_shows_every_option(harness):
    """help() and editors show the application and the registry first, then each option with its default."""
    parameters = list(inspect.signature(harness.adapter).parameters.values())
    assert parameters[0].name in ("app", "application")
    assert (parameters[1].name, parameters[1].default) == ("registry", None)
    assert {each.name: each.default for each in parameters[2:]} == DEFAULTS
    assert {each.kind for each in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
