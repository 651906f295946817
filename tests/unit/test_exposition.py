"""JSON, Prometheus text, OpenMetrics, and who gets which."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import tapes
from tapes.errors import InvalidArgument
from tapes.exposition import FORMS, negotiate, render, write
from tapes.exposition.endpoint import answer
from tapes.exposition.prometheus import render as render_prometheus
from tapes.metrics.counter import CounterState
from tapes.snapshot import Family, Snapshot
from tapes.sums import Total


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
    """prometheus_client's parsers read back every value of both formats."""
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
    """promtool, Prometheus's own checker, finds no problem in the text format."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=render(filled, "prometheus"), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


@pytest.mark.needs("promtool")
def test_promtool_reads_hostile_names_labels_and_texts(registry):
    """promtool reads any name, label and text that can be recorded."""
    hostile = [
        '"',
        "\\",
        "\n",
        "\r\n",
        "\u2028",
        "\x85",
        "\x00",
        "",
        " x ",
        '"} 1 # ',
        "é",
        "\udc80",
        "{x=y}",
    ]
    for number, text in enumerate(hostile):
        registry.describe(f"c{number}", f"{text} help {text}", unit=text)
        registry.counter(f"c{number}", quantity=text).increment(2**70)
        registry.gauge("g", text=text).set(-1.5)
        registry.describe(f"h{number}", f"{text} help {text}", unit=text, buckets=(-1.5, 1e6, 1e300))
        registry.histogram(f"h{number}", le=text, exported_le=text).update(-3)
    for name in ("5xx", "größe", "x-y z", "x/y", "z:x", 'z"y', "z\\z", "_total", "x_created", "y_count"):
        registry.counter(name).increment()
        registry.timer(name + "_x").update(1)
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=render(registry, "prometheus"),
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_json_is_the_tree(filled):
    """What get_stats() returns, and nothing that JSON doesn't have."""
    assert json.loads(render(filled, "json")) == filled.get_stats()


def test_names_that_collide_are_reported_and_the_text_stays_valid(registry, caplog):
    """first.taken and first_taken are one name for Prometheus: the second is left out, and logged."""
    registry.counter("first.taken").increment(1)
    registry.counter("first_taken").increment(2)
    assert render(registry, "prometheus").count(b"first_taken_total ") == 3
    assert "first_taken" in caplog.text


def test_a_collision_is_logged_once_with_both_names(registry, caplog):
    """However often it is read, and by whom."""
    registry.counter("twice.said").increment(1)
    registry.gauge("twice_said").set(2)
    for form in ("prometheus", "openmetrics", "prometheus"):
        assert b"twice_said 2" not in render(registry, form)
    (record,) = caplog.records
    assert "'twice_said' is not exposed" in record.message
    assert "taken by 'twice.said'; rename one" in record.message


def test_series_that_look_the_same_are_shown_once(registry, caplog):
    """Of two series that are written alike the first is shown; the other is logged once."""
    registry.counter("c", path="\udc80").increment(2)
    registry.counter("c", path="?").increment(1)
    for _ in range(2):
        assert re.findall(b"^c_total.*", render(registry, "prometheus"), re.MULTILINE) == [
            b'c_total{path="?"} 1'
        ]
    (record,) = caplog.records
    assert """'c' is not exposed: another one of it is written {path="?"} too""" in record.message


COLLISIONS = [
    (("histogram", "a"), ("gauge", "a_count")),
    (("timer", "a"), ("gauge", "a.seconds.sum")),
    (("histogram", "a"), ("histogram", "a_bucket")),
    (("counter", "a.b"), ("gauge", "a_b")),
    (("counter", "x.y.seconds"), ("timer", "x.y")),
    (("counter", "a"), ("gauge", "a_created")),
    (("timer", "a"), ("gauge", "a_seconds_created")),
    (("histogram", "a"), ("counter", "a.count_total")),
    (("counter", "a"), ("meter", "a_total")),
]


@pytest.mark.parametrize("pair", COLLISIONS)
@pytest.mark.parametrize("openmetrics", [False, True])
def test_no_family_takes_the_names_of_anothers_samples(registry, pair, openmetrics):
    """If families collide in any way, a parser accepts what is left."""
    for kind, name in pair:
        getattr(registry, kind)(name)
    text = render_prometheus(registry, openmetrics=openmetrics).decode()
    names = [s.name for f in (parse_openmetrics if openmetrics else parse_text)(text) for s in f.samples]
    assert names


def test_negative_values_leave_openmetrics_without_a_sum(registry):
    """With negative values OpenMetrics has no sum, as its parser demands."""
    registry.histogram("h").update(-5)
    text = render_prometheus(registry, openmetrics=True).decode()
    assert "_sum" not in text
    list(parse_openmetrics(text))


@pytest.mark.parametrize("name", ["5xx", "größe", "a-b c", "x/y"])
def test_whatever_is_a_name_is_written_as_prometheus_takes_it(registry, name):
    """Every valid name of tapes is written as a valid name of Prometheus."""
    registry.counter(name).increment()
    (family,) = parse_text(render(registry, "prometheus").decode())
    assert family.samples[0].value == 1


def test_colons_are_left_to_recording_rules(registry):
    """Colons in names become underscores: Prometheus reserves them for recording rules."""
    registry.gauge("job:size").set(1)
    assert b"job_size 1\n" in render(registry, "prometheus")


def test_a_counter_called_total_keeps_a_name(registry):
    """Its name without ``_total`` would be empty."""
    registry.counter("-total").increment()
    (family,) = parse_openmetrics(render(registry, "openmetrics").decode())
    assert (family.name, family.samples[0].name) == ("_total", "_total_total")


def test_openmetrics_says_when_a_series_began(registry):
    """OpenMetrics has the start of a series in unix seconds, if it is known; the text format has none."""
    registry.counter("c", queue="mail").increment()
    registry.timer("t").update(0.25)
    registry.gauge("g").set(1)
    began = {name: registry.snapshot().series(name)[0].created for name in ("c", "t")}
    text = render(registry, "openmetrics").decode()
    assert f'c_total{{queue="mail"}} 1\nc_created{{queue="mail"}} {began["c"]:.3f}\n' in text
    assert f"t_seconds_count 1\nt_seconds_created {began['t']:.3f}\n" in text
    assert text.count("_created") == 2
    assert b"_created" not in render(registry, "prometheus")
    unknown = Family("c", "counter", None, [()], [CounterState()], 0)
    assert b"_created" not in write(Snapshot([unknown]), "openmetrics")


def test_whole_numbers_are_written_to_the_last_digit(registry):
    """A whole number is written in digits, also beyond 2^53, and beyond 2^63 where workers are merged."""
    for step in (2**53, 1):
        registry.counter("c").increment(step)
        registry.counter("low").decrement(step)
    text = render(registry, "prometheus").decode()
    assert "c_total 9007199254740993\n" in text
    assert "low_net -9007199254740993\n" in text
    merged = CounterState(Total(3 * 2**63 + 1))
    text = write(Snapshot([Family("c", "counter", None, [()], [merged], 0)]), "prometheus").decode()
    assert "c_total 27670116110564327425\n" in text


def test_a_description_says_which_buckets(registry):
    """For histograms and timers; bounds are spelled as Go does; other kinds have none."""
    bounds = (0.0, 0.5, 3, 99999.5, 1e6, 12345678, 1e16)
    for kind in ("histogram", "timer", "counter", "meter"):
        registry.describe(f"my.{kind}", "What it is.", buckets=bounds)
    registry.histogram("my.histogram").update(3)
    registry.timer("my.timer").update(4)
    registry.counter("my.counter").increment()
    registry.meter("my.meter").mark()
    text = render(registry, "prometheus").decode()
    spelled = ["0.0", "0.5", "3.0", "99999.5", "1e+06", "1.2345678e+07", "1e+16", "+Inf"]
    for name, counts in (
        ("my_histogram", [0, 0, 1, 1, 1, 1, 1, 1]),
        ("my_timer_seconds", [0, 0, 0, 1, 1, 1, 1, 1]),
    ):
        found = re.findall(rf'^{name}_bucket{{le="(.*)"}} (\d+)$', text, re.MULTILINE)
        assert found == [(bound, str(count)) for bound, count in zip(spelled, counts)]
    assert text.count("_bucket") == 2 * len(spelled)


def test_negative_bounds_leave_openmetrics_without_a_sum(registry):
    """With negative bounds OpenMetrics has no sum, as its parser demands; the text format has both."""
    registry.describe("h", "Degrees.", buckets=(-10, 0, 10))
    registry.histogram("h").update(5)
    assert b"h_sum 5.0\nh_count 1\n" in render(registry, "prometheus")
    assert b'h_bucket{le="-10.0"} 0\n' in render(registry, "openmetrics")
    assert b"h_sum" not in render(registry, "openmetrics")
    list(parse_openmetrics(render(registry, "openmetrics").decode()))


@pytest.mark.parametrize(
    ("unit", "name"), [("bytes", "h_bytes"), ("m/s", "h_m_s"), ("°C", "h_C"), ("%", "h")]
)
def test_a_unit_is_the_end_of_the_name(registry, unit, name):
    """A unit becomes the end of the name, as OpenMetrics demands; one without a letter is left out."""
    registry.describe("h", "How much.", unit=unit)
    registry.histogram("h").update(1)
    (family,) = parse_openmetrics(render(registry, "openmetrics").decode())
    assert family.name == name
    assert family.unit == name[2:]


def test_a_gauge_whose_producer_failed_is_not_there(registry):
    """A gauge whose producer failed is left out, and the others of its name are shown."""
    registry.gauge("g", lambda: 1 / 0, number="1")
    registry.gauge("g", number="2").set(2)
    registry.gauge("none", lambda: 1 / 0)
    text = render(registry, "prometheus").decode()
    assert re.findall(r"^g.*", text, re.MULTILINE) == ['g{number="2"} 2']
    assert "none" not in text


def test_both_sources_remember_only_what_they_still_have(registry):
    """A series that was removed leaves nothing behind."""
    registry.counter("c").increment()
    registry.counter("gone").increment()
    render(registry, "prometheus")
    memory = registry.snapshot().memory
    registry.remove("gone")
    render(registry, "openmetrics")
    assert [set(kept) for kept in memory.values()] == [{"c"}]


def test_a_label_called_le_does_not_break_buckets(registry):
    """A label le gets another name in buckets, which have a label of that name, and nowhere else."""
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
    """A registry without metrics is written without an error."""
    empty = tapes.Registry()
    assert render(empty, "prometheus") == b""
    assert render(empty, "openmetrics") == b"# EOF\n"
    assert json.loads(render(empty, "json")) == {}


OM_1, OM_0 = "application/openmetrics-text;version=1.0.0", "application/openmetrics-text;version=0.0.1"
PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
SCRAPERS = {
    "Prometheus 2.5": (f"{OM_0},text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "prometheus"),
    "Prometheus 2.40": (f"{OM_1},{OM_0};q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "openmetrics"),
    "Prometheus 2.40, native histograms": (
        f"{PROTOBUF},{OM_1};q=0.8,{OM_0};q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "openmetrics",
    ),
    "Prometheus 2.49": (f"{OM_1};q=0.5,{OM_0};q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", "openmetrics"),
    "Prometheus 2.49, native histograms": (
        f"{PROTOBUF};q=0.5,{OM_1};q=0.4,{OM_0};q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        "openmetrics",
    ),
    "Prometheus 3": (
        f"{OM_1};escaping=allow-utf-8;q=0.6,{OM_0};q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        "openmetrics",
    ),
    "Prometheus 3, legacy names": (
        f"{OM_1};escaping=underscores;q=0.6,{OM_0};q=0.5,text/plain;version=1.0.0;escaping=underscores;q=0.4,"
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        "openmetrics",
    ),
    "Prometheus 3, native histograms": (
        f"{PROTOBUF};q=0.6,{OM_1};escaping=dots;q=0.5,{OM_0};q=0.4,text/plain;version=1.0.0;escaping=dots;"
        "q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        "openmetrics",
    ),
    "Prometheus 3, PrometheusText0.0.4": ("text/plain;version=0.0.4;q=0.2,*/*;q=0.1", "prometheus"),
    "Prometheus 3, PrometheusText1.0.0": (
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.2,*/*;q=0.1",
        "prometheus",
    ),
    "Prometheus 3, OpenMetricsText0.0.1": (f"{OM_0};q=0.2,*/*;q=0.1", "prometheus"),
    "Prometheus 3, PrometheusProto": (f"{PROTOBUF};q=0.2,*/*;q=0.1", "prometheus"),
    "vmagent": ("text/plain;version=0.0.4;q=1,*/*;q=0.1", "prometheus"),
    "Telegraf": (f"{PROTOBUF};q=0.7,text/plain;version=0.0.4;q=0.3,*/*;q=0.1", "prometheus"),
    "Datadog": ("text/plain", "prometheus"),
    "Datadog, use_latest_spec": (
        "application/openmetrics-text; version=0.0.1; charset=utf-8",
        "prometheus",
    ),
    "OpenMetrics alone": ("application/openmetrics-text; version=1.0.0; charset=utf-8", "openmetrics"),
    "OpenMetrics of a version to come": ("application/openmetrics-text; version=2.0.0", "prometheus"),
}
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize("scraper", SCRAPERS)
def test_scrapers_get_the_best_that_they_accept(scraper):
    """By the headers that they send; the text format where they accept anything, or nothing that we write."""
    accept, form = SCRAPERS[scraper]
    assert negotiate(accept) == form


def test_content_types_are_those_that_prometheus_demands():
    """Prometheus 3 refuses a scrape whose content type it doesn't know."""
    assert FORMS["prometheus"].content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert FORMS["openmetrics"].content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"


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
        ("application/json, text/plain, */*", "json"),
        ("text/plain, application/json", "prometheus"),
        ("text/plain, */*", "prometheus"),
        ("text/plain;q=0", "json"),
        ("*/*, text/plain;q=0.1", "json"),
        ("*/*;q=0.5, application/json;q=0", "prometheus"),
        ("*/*, application/openmetrics-text;q=0", "prometheus"),
        ("application/*", "json"),
        ("text/*", "prometheus"),
        ("text/plain;q=x", "json"),
        ("text/plain;q=nan", "json"),
        ('text/plain; version="0.0.4"', "prometheus"),
        ("text/plain; version=1.0.0; q=0, application/json; q=0.1", "json"),
        (BROWSER, "json"),
    ],
)
def test_clients_get_what_they_ask_for(accept, form):
    """The Accept header decides on the format; without one it is JSON."""
    assert negotiate(accept) == form


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("a/b," * 31 + "text/plain", "prometheus"),
        ("a/b," * 32 + "text/plain", "json"),
        ("application/json;q=0.5, text/plain;q=0.9" + "9" * 3000, "json"),
        ("application/json;q=0.5, text/plain;q=0.9," + " " * 3000, "prometheus"),
        ("text/plain" + " " * 3000, "json"),
    ],
)
def test_only_the_beginning_of_a_long_accept_header_is_read(accept, form):
    """32 ranges within 2,048 characters count; a range that is cut off does not."""
    assert negotiate(accept) == form


@pytest.mark.parametrize("part", ["a/b;q=0.1,", ",", ";", "a", "*/*;q=0.1;"])
def test_the_size_of_an_accept_header_does_not_add_to_the_work(part):
    """A header of 1 MB executes no more lines of code than one of 4 KB does."""

    def lines(size):
        executed = 0

        def trace(frame, event, argument):
            nonlocal executed
            executed += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            negotiate(part * (size // len(part)))
        finally:
            sys.settrace(before)
        return executed

    assert 10 < lines(1_000_000) <= lines(4_000) < 20_000


def test_only_the_beginning_of_a_long_query_is_read():
    """A format within the first 2,048 characters counts; one behind them does not."""
    registry = tapes.Registry()
    for padding, kind in ((400, "text/plain"), (1_000_000, "application/json")):
        status, headers, _ = answer(registry, "", "a=b&" * padding + "format=prometheus")
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, kind)


def test_the_query_wins_over_accept():
    """The format of the query wins over Accept; an unknown one is an error that names the known ones."""
    assert negotiate("text/plain", "json") == "json"
    with pytest.raises(InvalidArgument, match=r"'yaml'.*json or prometheus or openmetrics"):
        negotiate("", "yaml")
