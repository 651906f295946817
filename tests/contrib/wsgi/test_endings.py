"""When a WSGI request ends, and with which status."""

from __future__ import annotations

import gc

import pytest

from tapes.contrib.wsgi import TapesMiddleware
from tests.contrib.recorded import active, counts
from tests.contrib.wsgi.server import Body, call, serving


def test_a_body_is_closed_once_and_counted_once(registry):
    """A body is closed as often as the server closes it, and its request is counted once."""
    body = Body([b"a", b"b"])
    result = call(TapesMiddleware(serving(body), registry))
    assert active(registry) == 1
    assert list(result) == [b"a", b"b"]
    result.close()
    result.close()
    assert body.closed == 2  # as often as the server calls it, and no more
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}
    assert active(registry) == 0


def test_a_client_that_goes_away_is_a_499(registry):
    """A body that is closed half-way is a 499, unless the server has all that Content-Length announces."""
    for length, pieces, status in (("9", 1, "499"), ("2", 1, "499"), ("2", 2, "200"), ("2", 0, "200")):
        body = Body([b"a", b"b", b""])
        result = call(TapesMiddleware(serving(body, headers=[("content-length", length)]), registry))
        for _, _piece in zip(range(pieces), result):
            pass
        result.close()
        assert body.closed == 1
        assert counts(registry).pop(("GET", "<unmatched>", status)) > 0
    assert counts(registry) == {("GET", "<unmatched>", "499"): 2, ("GET", "<unmatched>", "200"): 2}
    assert active(registry) == 0


def test_a_body_that_is_dropped_ends_its_request(registry):
    """A body that is dropped without close() ends its request when it is freed."""
    result = call(TapesMiddleware(serving([b"a", b"b"]), registry))
    iterator = iter(result)
    next(iterator)
    assert active(registry) == 1
    del result, iterator
    gc.collect()
    assert active(registry) == 0


def test_answers_that_are_cut_short_for_a_reason(registry):
    """A HEAD without a body keeps its status; an answer that never started is a 500."""
    for method in ("HEAD", "GET"):
        result = call(TapesMiddleware(serving(Body([b"a", b"b"])), registry), REQUEST_METHOD=method)
        next(iter(result))
        result.close()
    result = call(TapesMiddleware(lambda environ, start_response: Body([b"a", b"b"]), registry))
    next(iter(result))
    result.close()
    assert counts(registry) == {
        ("HEAD", "<unmatched>", "200"): 1,
        ("GET", "<unmatched>", "499"): 1,
        ("GET", "<unmatched>", "500"): 1,
    }


def test_a_body_that_is_never_iterated_is_counted(registry):
    """close() alone ends a request, with the status of its answer."""
    call(TapesMiddleware(serving(Body([b"a"])), registry)).close()
    assert counts(registry) == {("GET", "<unmatched>", "200"): 1}
    assert active(registry) == 0


def test_an_exception_in_the_middle_reaches_the_server_and_is_a_500(registry):
    """An exception of a body is recorded once, raised unchanged, and the body is still closed."""
    body = Body([b"a", b"b"], fail_at=1)
    result = call(TapesMiddleware(serving(body), registry))
    assert next(result) == b"a"
    with pytest.raises(RuntimeError, match="in the middle"):
        next(result)
    result.close()
    assert body.closed == 1
    assert counts(registry) == {("GET", "<unmatched>", "500"): 1}
    assert active(registry) == 0
