"""tapes.distributed.supervision.rendezvous: how a process attaches to an aggregator, or starts one."""

from __future__ import annotations

import pytest

from tapes import forks
from tapes.distributed.storage.locks import Lock
from tapes.distributed.supervision import rendezvous
from tapes.distributed.supervision.rendezvous import Attachment, Service, ensure_aggregator
from tapes.distributed.transport.address import resolve
from tapes.distributed.transport.requests import OlderAggregator


class Aggregator:
    """An aggregator at ``endpoints`` as its lock and its replies show it; an address of TCP has no lock.

    Args:
        endpoints: Where it listens.
        replies: Its replies to requests to attach: a result, or an error.
    """

    def __init__(self, endpoints, *replies):
        self.lock = Lock(endpoints)
        self.replies = list(replies)
        self.calls = []

    def attach(self, endpoints, *processes):
        self.calls.append("attach")
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def launch(self, endpoints, *_):
        self.calls.append("launch")
        self.lock.acquire()

    def replace(self, endpoints):
        self.calls.append("replace")
        self.lock.release()


OLDER = OlderAggregator("it is older")


@pytest.mark.parametrize(
    ("is_running", "replies", "calls"),
    [
        (True, [True], ["attach"]),
        (False, [True], ["launch", "attach"]),
        (True, [False], ["attach"]),
        (True, [OLDER, True], ["attach", "replace", "launch", "attach"]),
    ],
    ids=["attached", "absent", "unanswered", "older"],
)
def test_a_process_attaches_to_an_aggregator_or_starts_one(
    short_dir, monkeypatch, is_running, replies, calls
):
    """It starts one if there is none, replaces an older one, and leaves one that does not answer."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    assert attempts(endpoints, monkeypatch, is_running, replies) == calls


@pytest.mark.parametrize(
    ("replies", "calls"),
    [
        ([True], ["attach"]),
        ([False, True], ["attach", "launch", "attach"]),
        ([OLDER, OLDER], ["attach", "replace", "attach"]),
    ],
    ids=["attached", "unanswered", "older"],
)
def test_over_tcp_only_a_request_shows_whether_there_is_an_aggregator(monkeypatch, replies, calls):
    """Over TCP a process starts an aggregator if none answers; one of an older release is not replaced."""
    assert attempts(resolve("tcp://127.0.0.1:5555"), monkeypatch, False, replies) == calls


def test_an_attached_process_asks_only_once(short_dir, monkeypatch):
    """A process that is attached does not ask again as long as that aggregator lives."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    assert attempts(endpoints, monkeypatch, True, [True], times=3) == ["attach"]


def attempts(endpoints, monkeypatch, is_running, replies, times=1):
    """Return what `ensure_aggregator` does at ``endpoints``."""
    aggregator = Aggregator(endpoints, *replies)
    monkeypatch.setattr(rendezvous, "keep_alive_for", aggregator.attach)
    monkeypatch.setattr(rendezvous, "launch", aggregator.launch)
    monkeypatch.setattr(rendezvous, "replace", aggregator.replace)
    monkeypatch.setattr(rendezvous, "_attached", set())
    monkeypatch.setenv("TAPES_ADDR", "")
    if is_running:
        aggregator.lock.acquire()
    for _ in range(times):
        found = ensure_aggregator(Service(forks.this_process(), "a test"), endpoints.publish)
    aggregator.lock.release()
    assert found == endpoints
    return aggregator.calls


def test_the_result_of_attaching_has_a_name(short_dir, monkeypatch):
    """attach() does not ask where no process holds the lock."""
    endpoints = resolve(f"ipc://{short_dir}/m.ipc")
    assert rendezvous.attach(endpoints, forks.this_process()) is Attachment.ABSENT
