"""Pauses between attempts."""

from hypothesis import given
from hypothesis import strategies as st

from tapes.backoff import Backoff


def test_pauses_double_up_to_the_maximum():
    """Each pause is twice the one before, and none is longer than the maximum."""
    backoff = Backoff(0.2, 10.0)
    assert [backoff.next() for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_reset_begins_again():
    """After a success the first pause is the first one again."""
    backoff = Backoff(0.2, 10.0)
    assert [backoff.next(), backoff.next()] == [0.2, 0.4]
    backoff.reset()
    assert [backoff.next(), backoff.next()] == [0.2, 0.4]


@given(st.floats(1e-3, 1e3), st.floats(1.0, 1e3), st.integers(1, 2000))
def test_pauses_never_shrink_and_never_exceed_the_maximum(first, factor, attempts):
    """However many attempts fail, pauses ascend and stay finite."""
    backoff = Backoff(first, first * factor)
    pauses = [backoff.next() for _ in range(attempts)]
    assert pauses == sorted(pauses)
    assert first == pauses[0] <= pauses[-1] <= first * factor
