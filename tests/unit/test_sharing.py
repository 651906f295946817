"""Reads of a process share their answers, and a process answers a bounded number of readers."""

import os
import signal
import threading
import time

import pytest

import tapes
from tapes.errors import AggregatorUnavailable
from tapes.exposition import endpoint
from tapes.sharing import Pressure, Shared
from tapes.testing import ManualClock
from tests.processes import wait_for


class Work:
    """A function that takes as long as the test wants; returns the number of its call."""

    def __init__(self):
        self.calls = 0
        self.goes_on = threading.Event()
        self.error = None

    def __call__(self):
        self.calls += 1
        number = self.calls
        assert self.goes_on.wait(20)
        if self.error is not None:
            raise self.error
        return number


class Callers:
    def __init__(self, shared, work, number, key="json"):
        self.results, self.errors = [], []
        self.threads = [threading.Thread(target=self.call, args=(shared, work, key)) for _ in range(number)]
        for thread in self.threads:
            thread.start()

    def call(self, shared, work, key):
        try:
            self.results.append(shared.call(key, work))
        except BaseException as error:
            self.errors.append(error)

    def join(self):
        for thread in self.threads:
            thread.join(30)


@pytest.fixture
def shared():
    return Shared(10.0)


@pytest.fixture
def work():
    work = Work()
    yield work
    work.goes_on.set()


def test_calls_during_a_running_call_share_the_next_one(shared, work):
    """All callers that arrive while a call runs share the result of the next call."""
    first = Callers(shared, work, 1)
    wait_for(lambda: work.calls == 1, "the first call runs")
    others = Callers(shared, work, 30)
    wait_for(lambda: sum(thread.is_alive() for thread in others.threads) == 30, "the others wait")
    assert work.calls == 1
    work.goes_on.set()
    first.join(), others.join()
    assert first.results == [1]
    assert len(others.results) == 30
    # A thread that had not come to the lock when the second call began makes a third one.
    assert set(others.results) <= {2, 3, 4}


def test_a_call_never_gets_a_result_that_began_before_it(shared):
    """A caller that arrives during a call gets a later result, which has what it recorded before."""
    recorded, seen = [], []

    def read():
        now = len(recorded)
        time.sleep(0.001)
        return now

    def record_and_read():
        for _ in range(50):
            recorded.append(1)
            least = len(recorded)
            seen.append(shared.call("json", read) >= least)

    threads = [threading.Thread(target=record_and_read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 400


def test_calls_of_different_keys_run_side_by_side(shared, work):
    """Calls with different keys run at the same time."""
    one, other = Callers(shared, work, 1, "json"), Callers(shared, work, 1, "prometheus")
    wait_for(lambda: work.calls == 2, "both run")
    work.goes_on.set()
    one.join(), other.join()


def test_an_error_reaches_every_caller_and_the_next_call_runs_again(shared, work):
    """Every caller that shares a failing call gets the error, and the next call runs again."""
    work.error = AggregatorUnavailable("it is gone", remedy="wait")
    callers = Callers(shared, work, 5)
    work.goes_on.set()
    callers.join()
    assert [str(error) for error in callers.errors] == ["it is gone; wait"] * 5
    assert len({id(error) for error in callers.errors}) > 1 or work.calls == 5
    work.error = None
    assert shared.call("json", work) == work.calls


def test_a_system_exit_in_a_shared_call_leaves_no_other_caller_waiting(shared, work):
    """A SystemExit in the thread that makes a shared call leaves no other thread waiting."""
    work.error = SystemExit()
    first = Callers(shared, work, 1)
    wait_for(lambda: work.calls == 1, "the first call runs")
    second = Callers(shared, work, 1)
    wait_for(lambda: shared._next, "it leads the next")
    third = Callers(shared, work, 1)
    work.goes_on.set()
    first.join()
    second.join()
    third.join()
    assert all(isinstance(error, SystemExit) for error in first.errors + second.errors + third.errors)
    assert not shared._next
    assert not shared._running


def test_a_call_that_never_returns_delays_others_once(work):
    """A call that never returns lets one later caller time out; the callers after that get answers."""
    shared = Shared(0.2)
    stuck = Callers(shared, work, 1)
    wait_for(lambda: work.calls == 1, "it runs")
    with pytest.raises(AggregatorUnavailable, match=r"could not be collected within 0.2 s; ask again"):
        shared.call("json", lambda: 1)
    assert shared.call("json", lambda: 7) == 7
    work.goes_on.set()
    stuck.join()


def test_a_signal_handler_that_reads_is_answered_while_its_thread_reads(shared):
    """A signal handler that interrupts a read of its own thread can read too."""
    answers = []
    before = signal.signal(signal.SIGALRM, lambda *_: answers.append(shared.call("json", lambda: "handler")))
    try:

        def read():
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            wait_for(lambda: answers, "the handler was answered")
            return "reader"

        assert shared.call("json", read) == "reader"
        assert answers == ["handler"]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def clock():
    return ManualClock(100.0)


def test_readers_beyond_the_limit_are_refused_with_a_sentence(clock):
    """A reader beyond the limit is refused with a sentence that says when to ask again."""
    pressure = Pressure(2, clock)
    with pressure.reader(), pressure.reader():
        one_more = pressure.reader()
        with pytest.raises(AggregatorUnavailable, match=r"answers 2 readers already; ask again in a second"):
            one_more.__enter__()
    with pressure.reader(), pressure.reader():
        pass


def read(pressure, clock, seconds):
    with pressure.reader():
        clock.advance(seconds)


def is_one_at_a_time(pressure):
    with pressure.reader():
        try:
            with pressure.reader():
                return False
        except AggregatorUnavailable:
            return True


def test_after_too_many_slow_reads_one_reader_at_a_time_is_answered(clock):
    """After too many slow reads one reader at a time is answered, until a second has passed."""
    pressure = Pressure(10, clock)
    for _ in range(3):
        read(pressure, clock, 0.4)
    assert is_one_at_a_time(pressure)
    clock.advance(1.0)
    assert not is_one_at_a_time(pressure)


def test_quick_reads_are_free(clock):
    """Reads that take less than 50 ms never use up the allowance."""
    pressure = Pressure(10, clock)
    for _ in range(10_000):
        read(pressure, clock, 0.04)
    assert not is_one_at_a_time(pressure)


def test_a_slow_read_that_many_share_counts_once(clock):
    """A slow read that fifty readers share uses the allowance of one."""
    pressure = Pressure(100, clock)
    readers = [pressure.reader() for _ in range(50)]
    for reader in readers:
        reader.__enter__()
    clock.advance(0.5)
    for reader in readers:
        reader.__exit__(None, None, None)
    assert not is_one_at_a_time(pressure)


def test_after_a_long_burst_several_readers_are_answered_again_within_four_seconds(clock):
    """After a long burst of slow reads, several readers at a time are answered again within 4.1 s."""
    pressure = Pressure(10, clock)
    for _ in range(100):
        read(pressure, clock, 1.0)
    clock.advance(4.1)
    assert not is_one_at_a_time(pressure)


def test_a_forked_child_has_no_readers_and_a_lock_of_its_own():
    """A forked child starts with no readers and an unlocked lock, whatever its parent was doing."""
    pressure = endpoint._pressure
    with pressure.reader(), pressure._lock:
        pid = os.fork()
        if pid == 0:
            status = endpoint.answer(tapes.Registry())[0]
            os._exit(0 if status == 200 and pressure._readers == 0 else 1)
        assert os.waitpid(pid, 0)[1] == 0


def test_an_error_that_cannot_be_copied_reaches_every_caller(shared, work):
    """An error whose class can't be copied still reaches every caller of a shared call."""

    class Odd(Exception):
        def __init__(self, one, *, two):
            super().__init__(one, two)

    work.error = Odd(1, two=2)
    callers = Callers(shared, work, 5)
    work.goes_on.set()
    callers.join()
    assert [type(error) for error in callers.errors] == [Odd] * 5
