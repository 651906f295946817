"""tapes.distributed.aggregator.answers: one answer serves all readers that wait for the same form."""

import threading

import pytest

from tapes.distributed.aggregator import answers
from tapes.distributed.aggregator.answers import Answers, Question
from tapes.distributed.protocol.messages import WAIT, Reply
from tapes.distributed.protocol.wire import decode
from tests.processes import wait_for


class Maker:
    """Makes answers, as slowly as the test wants."""

    def __init__(self):
        self.made = []
        self.goes_on = threading.Event()
        self.is_making = threading.Event()
        self.answers = Answers(self.make, lambda: None)
        self.sent = []

    def make(self, what):
        self.made.append(what)
        self.is_making.set()
        assert self.goes_on.wait(20)
        return "ok", f"{what} {len(self.made)}".encode()

    def ask(self, *forms, start=0):
        for number, form in enumerate(forms, start):
            self.answers.put([b"client", b"%d" % number], Question(form, number))

    def answered(self):
        """Return the answers that are ready, without signs to wait, which a busy machine needs."""
        return [sent for sent in self.answers.ready() if decode(sent[1]).status != WAIT]

    def sends(self, number):
        """Wait for ``number`` answers in all, and return them as text by the number of the question."""
        wait_for(lambda: self.sent.extend(self.answered()) or len(self.sent) >= number, "they are made")
        return {
            decode(data).correlation: decode(data).payload.decode()
            for route, data in self.sent
            if route == [b"client", b"%d" % decode(data).correlation]
        }


@pytest.fixture
def maker():
    maker = Maker()
    yield maker
    maker.goes_on.set()
    maker.answers.stop()


def test_all_that_want_the_same_while_an_answer_is_made_get_the_next_one(maker):
    """All 500 requests for a format that arrive while an answer is made share the next answer."""
    maker.ask("json")
    assert maker.is_making.wait(10)
    maker.ask(*["json"] * 500, start=1)
    maker.goes_on.set()
    assert maker.sends(501) == {0: "json 1", **dict.fromkeys(range(1, 501), "json 2")}
    assert maker.made == ["json", "json"]


def test_each_form_is_made_once_and_the_one_that_has_waited_longest_comes_first(maker):
    """Each requested format is made once, in the order of the oldest requests."""
    maker.ask("states")
    assert maker.is_making.wait(10)
    maker.ask("openmetrics", "json", "openmetrics", "json", "prometheus", start=1)
    maker.goes_on.set()
    sent = maker.sends(6)
    assert maker.made == ["states", "openmetrics", "json", "prometheus"]
    assert sent == {
        0: "states 1", 1: "openmetrics 2", 2: "json 3", 3: "openmetrics 2", 4: "json 3", 5: "prometheus 4"
    }  # fmt: skip


def test_a_question_whose_reader_has_given_up_is_dropped(maker, monkeypatch):
    """A request whose reader has given up is dropped, and later requests are answered."""
    maker.ask("json")
    assert maker.is_making.wait(10)
    monkeypatch.setattr(answers, "MAX_WAIT_SECONDS", -1.0)
    maker.ask("prometheus", "json", start=1)
    monkeypatch.undo()
    maker.ask("json", start=3)
    maker.goes_on.set()
    assert maker.sends(2) == {0: "json 1", 3: "json 2"}


def test_where_no_thread_can_start_answers_are_made_at_once(maker, monkeypatch):
    """If no thread can be started, answers are made at once in the calling thread."""

    def refuse(worker):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(answers.NativeThread, "start", refuse)
    maker.goes_on.set()
    maker.ask("json", "json")
    assert [decode(data) for _, data in maker.answers.ready()] == [
        Reply(0, "ok", b"json 1"), Reply(1, "ok", b"json 2")
    ]  # fmt: skip


def test_while_a_long_answer_is_made_its_readers_are_asked_to_wait(maker, monkeypatch):
    """While a long answer is made, all waiting readers are sent a sign to wait."""
    monkeypatch.setattr(answers, "_SIGN_SECONDS", 0.01)
    maker.answers.put([b"client"], Question("json", 3))
    maker.answers.put([b"other"], Question("prometheus", 5))
    assert maker.is_making.wait(10)
    signs = wait_for(lambda: list(maker.answers.ready()), "it sends a sign")
    assert [(route, decode(data)) for route, data in signs] == [
        ([b"client"], Reply(3, WAIT, b"")), ([b"other"], Reply(5, WAIT, b""))
    ]  # fmt: skip
    maker.goes_on.set()
    wait_for(lambda: maker.sent.extend(maker.answers.ready()) or len(maker.sent) >= 2, "both are made")
    answered = [decode(data).payload for _, data in maker.sent if decode(data).status == "ok"]
    assert answered[:2] == [b"json 1", b"prometheus 2"]
