"""A logger that logs each warning once."""

import logging
import signal
import threading

import pytest

from tapes.once import OnceLogger

LOG = logging.getLogger("tapes.test_once")


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_warning_is_logged_once_for_each_key(caplog):
    """The first warning of a key is logged, later ones of that key are not."""
    once = OnceLogger(LOG)
    assert [once.warning(key, "%s failed", key) for key in ("a", "b", "a", "b", "a")] == [
        True,
        True,
        *[False] * 3,
    ]
    assert messages(caplog) == ["a failed", "b failed"]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_forgotten_key_is_logged_again(caplog):
    """After forget() the next warning of that key is logged again; forgetting an unknown key does nothing."""
    once = OnceLogger(LOG)
    once.forget("a")
    for _ in range(2):
        once.warning("a", "failed")
        once.warning("a", "failed")
        once.forget("a")
    assert messages(caplog) == ["failed", "failed"]


def test_memory_is_bounded_and_the_last_warning_says_so(caplog):
    """Once the maximum of keys is reached nothing more is kept or logged, and the last message says so."""
    once = OnceLogger(LOG, max_keys=3)
    logged = [once.warning(key, "%d failed", key) for key in range(1000)]
    assert logged.count(True) == 3
    assert messages(caplog) == [
        "0 failed",
        "1 failed",
        "2 failed (tapes logs no further warnings of this kind)",
    ]
    once.forget(0)
    assert once.warning(7, "another")


def test_an_error_can_be_logged_with_its_traceback(caplog):
    """exc_info is passed on to logging."""
    error = ValueError("no")
    OnceLogger(LOG).warning("a", "failed", exc_info=error)
    assert caplog.records[0].exc_info[1] is error


@pytest.mark.parametrize("args", [(), ("one", "too many")])
def test_it_never_raises_whatever_logging_does(args):
    """A logging handler that raises, or arguments that do not fit the message, raise nothing."""

    class Raises(logging.Handler):
        def emit(self, record):
            record.getMessage()
            raise RuntimeError("the log is broken")

    handler = Raises()
    LOG.addHandler(handler)
    try:
        assert OnceLogger(LOG).warning("a", "failed: %s", *args)
    finally:
        LOG.removeHandler(handler)


def test_a_logging_handler_may_warn_itself(caplog):
    """A logging handler that comes back with the same key does not end in a recursion."""
    once = OnceLogger(LOG)

    class Again(logging.Handler):
        def emit(self, record):
            once.warning("a", "failed")

    handler = Again()
    LOG.addHandler(handler)
    try:
        once.warning("a", "failed")
    finally:
        LOG.removeHandler(handler)
    assert messages(caplog) == ["failed"]


def test_of_many_threads_one_logs(caplog):
    """Of 16 threads that come with one key at the same moment exactly one logs."""
    once, start, logged = OnceLogger(LOG), threading.Barrier(16), []

    def warn():
        start.wait()
        logged.extend(once.warning(key, "%d failed", key) for key in range(50))

    threads = [threading.Thread(target=warn) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logged.count(True) == 50
    assert sorted(messages(caplog)) == sorted(f"{key} failed" for key in range(50))


def test_a_signal_handler_may_warn(caplog):
    """A signal handler that interrupts a warning can log one of its own, and neither waits for the other."""
    once = OnceLogger(LOG)

    class Interrupts(logging.Handler):
        def emit(self, record):
            if record.getMessage() == "outer":
                signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: once.warning("inner", "inner"))
    handler = Interrupts()
    LOG.addHandler(handler)
    try:
        once.warning("outer", "outer")
    finally:
        LOG.removeHandler(handler)
        signal.signal(signal.SIGUSR1, before)
    assert sorted(messages(caplog)) == ["inner", "outer"]


def test_a_handler_that_ends_the_process_is_not_held_up():
    """What is no Exception, such as KeyboardInterrupt, passes through."""

    class Ends(logging.Handler):
        def emit(self, record):
            raise KeyboardInterrupt

    handler = Ends()
    LOG.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            OnceLogger(LOG).warning("a", "failed")
    finally:
        LOG.removeHandler(handler)
