"""tapes.testing: what helps to test code that records."""

from __future__ import annotations

import math
import re

import pytest

import tapes
from tapes.errors import BadValue
from tapes.session import Session
from tapes.testing import ManualClock, assert_recorded, strict

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("kind", "record", "bad"),
    [
        ("counter", "increment", -1), ("counter", "decrement", "x"), ("meter", "mark", None),
        ("histogram", "update", math.nan), ("timer", "update", -0.5), ("gauge", "set", "12"),
    ],
)  # fmt: skip
def test_a_bad_value_raises_from_the_call_that_records_it(registry, kind, record, bad):
    """With what, got and expected; and what is good beside it still counts."""
    before = getattr(registry, kind)("before", queue="mail")
    with strict(registry):
        for metric in (before, getattr(registry, kind)("within", queue="mail")):
            getattr(metric, record)(2)
            with pytest.raises(BadValue, match=r"queue=.*can't record it: got .*, expected "):
                getattr(metric, record)(bad)
            getattr(metric, record)(2)
            fields = registry.snapshot().get(metric.name, queue="mail").fields()
            assert fields.get("value", fields.get("count")) in (4, 2, -4)
    getattr(before, record)(bad)
    assert_recorded("tapes.rejected", value=1, registry=registry)


def test_a_failing_producer_raises_from_the_read(registry):
    """A failing producer raises BadValue from the read, with its own exception as context."""
    registry.gauge("g", lambda: 1 / 0)
    with strict(registry), pytest.raises(BadValue, match="ZeroDivisionError"):
        registry.snapshot()


def test_a_strict_block_begins_and_ends_with_nothing_recorded(registry):
    """A strict block begins and ends with nothing recorded; metrics made before it take part."""
    counter = registry.counter("c")
    timer = registry.timer("t")
    counter.increment(5)
    with strict(registry) as same:
        assert same is registry
        assert_recorded("c", value=0, registry=registry)
        counter.increment()
        with timer.time():
            registry.clock.advance(0.5)
        assert_recorded("c", value=1, registry=registry)
        assert_recorded("t", count=1, sum=0.5, q50=0.5, registry=registry)
    assert_recorded("c", value=0, registry=registry)
    assert type(registry) is tapes.Registry
    counter.increment(2)
    assert_recorded("c", value=2, registry=registry)


class Connected(Session):
    """A session that is connected."""

    is_connected = True


def test_a_connected_registry_is_refused(registry):
    """Its numbers are not of this process alone."""
    registry.use(Connected(registry))
    with pytest.raises(tapes.TapesError, match="close"), strict(registry):
        pass


def test_a_failed_assertion_says_what_was_recorded(registry):
    """A failed assertion shows what differs and everything that was recorded."""
    registry.counter("jobs.done", queue="mail").increment(2)
    registry.gauge("pool.size").set(3)
    with pytest.raises(AssertionError) as caught:
        assert_recorded("jobs.done", {"queue": "mail"}, value=3, total=2, registry=registry)
    assert str(caught.value).splitlines() == [
        'jobs.done{queue="mail"}: value is 2, expected 3, there is no total, expected 2',
        "recorded:",
        '  jobs.done{queue="mail"}: value=2',
        "  pool.size: value=3",
    ]
    with pytest.raises(AssertionError, match=r"jobs.done was not recorded"):
        assert_recorded("jobs.done", registry=registry)
    with pytest.raises(AssertionError, match=r"nothing"):
        assert_recorded("jobs.done", registry=tapes.Registry())


def test_a_manual_clock_does_not_go_back():
    """A manual clock refuses to go back, as time is monotonic."""
    clock = ManualClock(3)
    clock.advance(0)
    with pytest.raises(tapes.TapesError, match="zero or more"):
        clock.advance(-1)
    assert clock() == 3.0


def test_the_fixture_is_there_for_every_project(pytester):
    """A project's own test: from the default registry, zeroed, strict, and quiet afterwards."""
    pytester.makepyfile(
        """
        import pytest, tapes
        from tapes.testing import assert_recorded

        jobs = tapes.counter("jobs.done")
        jobs.increment(7)

        @pytest.mark.parametrize("turn", [1, 2])
        def test_a_job_is_counted(tapes_registry, turn):
            jobs.increment()
            assert_recorded("jobs.done", value=1)
            with pytest.raises(tapes.TapesError):
                jobs.increment("one")
        """
    )
    pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider").assert_outcomes(passed=2)


def test_strict_blocks_nest(registry):
    """A strict block in the fixture is strict before, within and after the inner one."""
    counter = registry.counter("c")
    with strict(registry):
        counter.increment(3)
        with strict(registry):
            assert_recorded("c", value=0, registry=registry)
            with pytest.raises(BadValue):
                counter.increment("bad")
        with pytest.raises(BadValue):
            counter.increment("bad")
        assert_recorded("c", value=0, registry=registry)
    counter.increment("bad")
    assert registry.get_stats().tapes.rejected.value == 1


def test_without_fields_something_must_have_been_recorded(registry):
    """A metric that was only made is not enough."""
    counter = registry.counter("c")
    with pytest.raises(AssertionError, match="c was not recorded"):
        assert_recorded("c", registry=registry)
    assert_recorded("c", value=0, registry=registry)
    counter.increment()
    assert_recorded("c", registry=registry)


FAILING = {
    "assert_recorded": ("assert_recorded('jobs', value=2)", "jobs was not recorded"),
    "a count": ("tapes.counter('jobs').increment('one')", "got 'one', expected a finite number"),
    "a duration": ("tapes.timer('jobs').update('one')", "got 'one', expected a finite number"),
    "a size": ("tapes.histogram('jobs').update(None)", "got None, expected a finite number"),
    "an event": ("tapes.meter('jobs').mark(-1)", "expected zero or more"),
    "a gauge": ("tapes.gauge('jobs').set('one')", "got 'one', expected a finite number"),
    "a producer": ("(tapes.gauge('jobs', lambda: 1 / 0), tapes.get_stats())", "its producer failed"),
    "the clock": ("ManualClock().advance(-1)", "expected zero or more"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_test_ends_at_its_own_line(pytester, name):
    """What pytest shows of a failure is the line of the test, and no frame of tapes below it."""
    line, message = FAILING[name]
    pytester.makepyfile(
        f"import tapes\nfrom tapes.testing import *\n\ndef test_it(tapes_registry):\n    {line}\n"
    )
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    *_, shown = result.stdout.str().split("During handling of the above exception")
    assert message in shown
    assert re.search(rf"^> +{re.escape(line)}$", shown, re.MULTILINE)
    assert not re.search(r"^\S*tapes/\S+\.py:\d+", shown, re.MULTILINE)


def test_other_errors_show_all_frames(pytester):
    """An error that is not about a bad value shows all frames, as it may be a mistake of tapes."""
    pytester.makepyfile(
        """
        import tapes

        def test_it(tapes_registry):
            tapes.counter("jobs")
            tapes.meter("jobs")
        """
    )
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    assert re.search(r"^\S*tapes/registry\.py:\d+", result.stdout.str(), re.MULTILINE)
