"""JSON, Prometheus text, OpenMetrics, and who gets which."""

from __future__ import annotations

import json
import subprocess

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import tapes
from tapes.errors import InvalidArgument
from tapes.exposition import negotiate, render
from tapes.exposition.prometheus import render as render_prometheus


@pytest.fixture
def filled(registry):
    registry.counter("jobs.done", queue='m"a\\i\nl').increment(3)
    registry.counter("pool.taken").increment(5)
    registry.counter("pool.taken").decrement(2)
    registry.meter("cache.misses").mark(4)
    registry.gauge("queue.length").set(2.5)
    registry.describe("mail.size", 'How "large"\\\nthey are.', unit="bytes")
    for size in (3, 7, 30, 99999):
        registry.histogram("mail.size").update(size)
    for seconds in (0.004, 0.2, 0.2, 60):
        registry.timer("http.request", route="/a").update(seconds)
    return registry


@pytest.mark.parametrize("openmetrics", [False, True])
def test_parsers_read_back_every_value(filled, openmetrics):
    """prometheus_client's own parsers, both formats."""
    text = render_prometheus(filled, openmetrics=openmetrics).decode()
    families = list((parse_openmetrics if openmetrics else parse_text)(text))
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}
    assert samples["jobs_done_total", (("queue", 'm"a\\i\nl'),)] == 3
    assert samples["pool_taken_total", ()] == 5
    assert samples["pool_taken_net", ()] == 3
    assert samples["cache_misses_total", ()] == 4
    assert samples["queue_length", ()] == 2.5
    assert samples["mail_size_bytes_sum", ()] == 100039
    assert samples["mail_size_bytes_bucket", (("le", "10.0"),)] == 2
    assert samples["mail_size_bytes_bucket", (("le", "+Inf"),)] == samples["mail_size_bytes_count", ()] == 4
    route = ("route", "/a")
    assert samples["http_request_seconds_bucket", (("le", "0.005"), route)] == 1
    assert samples["http_request_seconds_bucket", (("le", "0.25"), route)] == 3
    assert samples["http_request_seconds_bucket", (("le", "10.0"), route)] == 3
    assert samples["http_request_seconds_count", (route,)] == 4
    kinds = {family.name: family.type for family in families}
    assert kinds["http_request_seconds"] == "histogram"
    assert kinds["queue_length"] == "gauge"
    help_texts = {family.name: family.documentation for family in families}
    assert help_texts["mail_size_bytes"] == 'How "large"\\\nthey are.'


@pytest.mark.needs("promtool")
def test_promtool_finds_nothing_to_complain_of(filled):
    """The text format, as Prometheus's own checker sees it."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=render(filled, "prometheus"), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_json_is_the_tree(filled):
    """What get_stats() returns, and nothing that JSON doesn't have."""
    assert json.loads(render(filled, "json")) == filled.get_stats()


def test_names_that_collide_are_reported_and_the_text_stays_valid(registry, caplog):
    """a.b and a_b are one name to Prometheus: the second is left out, and said."""
    registry.counter("a.b").increment(1)
    registry.counter("a_b").increment(2)
    assert render(registry, "prometheus").count(b"a_b_total ") == 3
    assert "a_b" in caplog.text


COLLISIONS = [
    (("histogram", "a"), ("gauge", "a_count")),
    (("timer", "a"), ("gauge", "a.seconds.sum")),
    (("histogram", "a"), ("histogram", "a_bucket")),
    (("counter", "a.b"), ("gauge", "a_b")),
    (("counter", "x.y.seconds"), ("timer", "x.y")),
]


@pytest.mark.parametrize("pair", COLLISIONS)
@pytest.mark.parametrize("openmetrics", [False, True])
def test_no_family_takes_the_names_of_anothers_samples(registry, pair, openmetrics):
    """Whatever collides, a parser accepts the rest."""
    for kind, name in pair:
        getattr(registry, kind)(name)
    text = render_prometheus(registry, openmetrics=openmetrics).decode()
    names = [s.name for f in (parse_openmetrics if openmetrics else parse_text)(text) for s in f.samples]
    assert names


def test_negative_values_leave_openmetrics_without_a_sum(registry):
    """As its parser demands."""
    registry.histogram("h").update(-5)
    text = render_prometheus(registry, openmetrics=True).decode()
    assert "_sum" not in text
    list(parse_openmetrics(text))


@pytest.mark.parametrize("name", ["5xx", "größe", "a-b c", "x/y"])
def test_whatever_is_a_name_is_written_as_prometheus_takes_it(registry, name):
    """Every name can be exposed."""
    registry.counter(name).increment()
    (family,) = parse_text(render(registry, "prometheus").decode())
    assert family.samples[0].value == 1


def test_a_label_called_le_does_not_break_buckets(registry):
    """It gets a name that is free, as the bucket's bound has that name; elsewhere it stays."""
    registry.histogram("h", le="x", exported_le="y").update(1)
    registry.counter("c", le="x", exported_le="y").increment()
    counter, histogram = parse_text(render(registry, "prometheus").decode())
    assert {s.labels["exported_exported_le"] for s in histogram.samples} == {"x"}
    assert counter.samples[0].labels == {"le": "x", "exported_le": "y"}


def test_lone_surrogates_are_replaced(registry):
    """A label from an undecodable path does not break the exposition."""
    registry.counter("c", path="\udc80").increment()
    assert b'path="?"' in render(registry, "prometheus")
    json.loads(render(registry, "json"))


def test_an_empty_registry_is_written():
    """No metrics is not an error."""
    empty = tapes.Registry()
    assert render(empty, "prometheus") == b""
    assert render(empty, "openmetrics") == b"# EOF\n"
    assert json.loads(render(empty, "json")) == {}


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("text/plain", "prometheus"),
        ("TEXT/PLAIN; charset=utf-8", "prometheus"),
        ("text/plain;q=0.5, application/json", "json"),
        ("application/json;q=0.5, text/plain;q=0.9", "prometheus"),
        ("text/plain;q=0", "json"),
        ("*/*, text/plain;q=0.1", "json"),
        ("text/*", "prometheus"),
        ("text/plain;q=x", "json"),
        (PROMETHEUS_2, "openmetrics"),
        (BROWSER, "json"),
    ],
)
def test_clients_get_what_they_ask_for(accept, form):
    """By Accept; JSON where nothing else is asked for."""
    assert negotiate(accept) == form


def test_the_query_wins_over_accept():
    """And a format that there isn't is told with those that there are."""
    assert negotiate("text/plain", "json") == "json"
    with pytest.raises(InvalidArgument, match=r"'yaml'.*json or prometheus or openmetrics"):
        negotiate("", "yaml")
