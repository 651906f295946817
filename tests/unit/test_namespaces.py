"""What was written in another pid namespace is taken over, or swept, by its age."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from tapes import forks, processes, service
from tapes.clock import monotonic
from tapes.distributed.aggregator.handler import Handler
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.protocol.messages import Attach, Goodbye
from tapes.distributed.protocol.wire import encode
from tapes.distributed.storage import spool
from tapes.distributed.storage.sweeping import sweep
from tapes.distributed.transport.address import resolve
from tapes.processes import Process
from tests.unit.handlers import DEAD_PROCESS, Worker, crash, values, write

BOOT = processes.host_id().partition("/")[0]
ELSEWHERE = f"{BOOT}/1"
THIRD = f"{BOOT}/2"
BEFORE = "before-the-machine-was-started/1"
HOUR = 3600.0


@pytest.fixture
def books(short_dir, monkeypatch):
    """Make a handler of an aggregator on another host, by default in another pid namespace."""

    def make(host=ELSEWHERE, lease=None):
        with monkeypatch.context() as patched:
            patched.setattr(processes, "host_id", lambda: host)
            made = Handler(resolve(f"ipc://{short_dir}/m.ipc"), lease or Lifetime.joined(DEAD_PROCESS), {})
        kept.append(made)
        return made

    kept = []
    yield make
    for one in kept:
        one.journal.remove()


def counting(times, **options):
    worker = Worker(**options)
    worker.registry.counter("c").increment(times)
    worker.registry.gauge("g").set(times)
    return worker


def killed(first, short_dir, ago=0.0):
    """Write an aggregator's journal, end it as if it were killed, and make the files older."""
    assert first.journal.finish()
    crash(first)
    age(short_dir, ago)


def age(place, ago):
    for path in (*place.iterdir(), place):
        os.utime(path, (time.time() - ago,) * 2)


@pytest.mark.parametrize(
    ("host", "ago", "taken"),
    [
        (ELSEWHERE, 0.0, True),
        (ELSEWHERE, 50.0, True),
        (ELSEWHERE, 70.0, False),
        (ELSEWHERE, -5 * HOUR, True),
        (BEFORE, 0.0, False),
        (BEFORE, -5 * HOUR, False),
        (processes.host_id(), 0.0, False),
    ],
)
def test_a_young_journal_of_another_namespace_is_taken_over(books, short_dir, host, ago, taken):
    """At most a minute old, or from the future; never of another boot, nor of this namespace if all ended."""
    first, gone = books(host), counting(3, process=DEAD_PROCESS, host=host)
    left = counting(4, process=DEAD_PROCESS, host=host)
    first.answer(counting(200, process=DEAD_PROCESS, host=host).goodbye())
    first.publication(gone.publication())
    assert spool.write(resolve(f"ipc://{short_dir}/m.ipc"), Goodbye(0, left.update()))
    killed(first, short_dir, ago)
    second = books(processes.host_id())
    second.restore()
    second.reap_workers(monotonic())
    assert values(second, "c") == [207 if taken else None]
    assert second.is_successor is taken


def test_a_journal_that_is_older_than_this_namespace_is_of_another_one(books, short_dir, monkeypatch):
    """A container that is started again may get the number of its former namespace."""
    for began, taken in ((100.0, False), (2.0, True)):
        first = books(processes.host_id())
        first.answer(counting(200, process=DEAD_PROCESS).goodbye())
        killed(first, short_dir, 20.0)
        monkeypatch.setattr(
            "tapes.distributed.storage.saved_journal.namespace_seconds", lambda began=began: began
        )
        second = books(processes.host_id())
        second.restore()
        assert values(second, "c") == [200 if taken else None]
        second.journal.remove()


def test_last_words_that_are_young_keep_an_older_journal(books, short_dir):
    """A worker left them in a file a moment ago: its service has not ended."""
    first = books()
    first.answer(counting(200, host=ELSEWHERE).goodbye())
    killed(first, short_dir, HOUR)
    assert spool.write(resolve(f"ipc://{short_dir}/m.ipc"), Goodbye(0, counting(4, host=THIRD).update()))
    second = books(processes.host_id())
    second.restore()
    second.reap_workers(monotonic())
    assert values(second, "c") == [204]


def test_last_words_from_before_the_machine_was_started_do_not_count(books, short_dir):
    """Without a journal too; those of every namespace of this boot do."""
    for host in (BEFORE, ELSEWHERE, processes.host_id()):
        spool.write(resolve(f"ipc://{short_dir}/m.ipc"), Goodbye(0, counting(4, host=host).update()))
    second = books(processes.host_id())
    second.restore()
    second.reap_workers(monotonic())
    assert values(second, "c") == [8]
    assert list(short_dir.glob("*.spool-*")) == []


@pytest.mark.parametrize("known_by", ["worker", "owner"])
def test_an_old_journal_is_taken_over_if_a_process_of_this_namespace_lives(books, short_dir, known_by):
    """The aggregator of another container knew it; it may be a supervisor that has no worker just now."""
    first, worker = books(), counting(5)
    first.answer(counting(200, host=ELSEWHERE, process=DEAD_PROCESS).goodbye())
    if known_by == "worker":
        first.publication(worker.publication())
    else:
        first.answer(encode(Attach(1, processes.host_id(), (forks.this_process(),))))
        first.answer(encode(Attach(1, THIRD, (Process(7, 7),))))
    killed(first, short_dir, HOUR)
    lease = Lifetime.joined(DEAD_PROCESS)
    second = books(processes.host_id(), lease)
    second.restore()
    assert values(second, "c") == [205 if known_by == "worker" else 200]
    if known_by == "owner":
        assert forks.this_process() in lease.owners
        assert Process(7, 7) not in lease.owners
        assert [hello.host for hello in second._lifetime.owners_elsewhere] == [ELSEWHERE, THIRD]


def test_owners_of_other_namespaces_are_forgotten_when_they_have_left(books, short_dir):
    """And of very many the first ones: containers come and go."""
    first = books(processes.host_id(), Lifetime.joined(forks.this_process()))
    for number in range(1, 3001):
        worker = counting(1, host=ELSEWHERE, process=Process(number, number))
        first.answer(encode(Attach(1, ELSEWHERE, (worker.process,))))
        if number <= 2000:
            first.answer(worker.goodbye())
    assert [len(hello.processes) for hello in first._lifetime.owners_elsewhere] == [1000]
    for number in range(3001, 5001):
        first.answer(encode(Attach(1, ELSEWHERE, (Process(number, number),))))
    assert [len(hello.processes) for hello in first._lifetime.owners_elsewhere] == [1000]


def test_workers_that_died_with_their_container_keep_their_counts(books, short_dir):
    """Their gauges leave after a minute of silence; no process of them is looked for here."""
    first, other = books(), counting(5, host=ELSEWHERE, process=forks.this_process())
    first.publication(other.publication())
    killed(first, short_dir)
    second = books(processes.host_id())
    second.restore()
    assert second.awaited == {other.identity}
    assert second.reap_workers(1000.0) == 1
    assert values(second, "c", "g") == [5, 5]
    assert second.reap_workers(1061.0) == 0
    assert second.awaited == set()
    for now in (1061.0, 99999.0):
        second.reap_workers(now)
        assert values(second, "c", "g") == [5, None]


def test_the_age_of_a_journal_is_how_long_ago_its_aggregator_lived(books, short_dir, monkeypatch):
    """It is shown every 10 s although nothing is recorded, as by workers that can run no thread."""
    first = books()
    write(first)
    assert first.journal.finish()
    path = short_dir / "m.ipc.journal"
    os.utime(path, (1, 1))
    first.journal.step(monotonic())
    assert path.stat().st_mtime == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10.1)
    content = path.read_bytes()
    first.journal.step(now)
    assert abs(time.time() - path.stat().st_mtime) < 5
    assert path.read_bytes() == content


@pytest.fixture
def private(short_dir, monkeypatch):
    """The directory of a service whose supervisor is no process of this namespace."""
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(short_dir))
    monkeypatch.setattr(service, "parents", lambda: [str(short_dir)])
    place = short_dir / f"tapes-{DEAD_PROCESS.pid}-{DEAD_PROCESS.started}"
    place.mkdir(0o700)
    return place


def journal_in(place, monkeypatch, host, *, worker_of=None):
    """Write the journal of a service on ``host`` whose processes, if it is this host, have ended."""
    with monkeypatch.context() as patched:
        patched.setattr(processes, "host_id", lambda: host)
        first = Handler(resolve(f"ipc://{place}/metrics.ipc"), Lifetime.joined(DEAD_PROCESS), {})
    worker = counting(1, process=DEAD_PROCESS, host=worker_of or host)
    first.publication(worker.publication())
    assert first.journal.finish()
    crash(first)
    (place / "metrics.ipc.lock").touch()


@pytest.mark.parametrize(
    ("host", "worker_of", "ago", "swept"),
    [
        ("no journal", None, 0.0, False),
        ("no journal", None, 0.9 * HOUR, False),
        ("no journal", None, 1.1 * HOUR, True),
        ("a broken one", None, 0.0, False),
        ("a broken one", None, 1.1 * HOUR, True),
        (ELSEWHERE, None, 0.0, False),
        (ELSEWHERE, None, 0.9 * HOUR, False),
        (ELSEWHERE, None, 1.1 * HOUR, True),
        (BEFORE, None, 0.0, False),
        (BEFORE, None, 1.1 * HOUR, True),
        (processes.host_id(), ELSEWHERE, 0.0, False),
        (processes.host_id(), ELSEWHERE, 1.1 * HOUR, True),
        (processes.host_id(), None, 0.0, True),
    ],
)
def test_what_another_namespace_may_use_is_swept_by_its_age(
    private, monkeypatch, host, worker_of, ago, swept
):
    """At once only what was of this namespace alone and has ended; no aggregator lives in any of these."""
    if host == "a broken one":
        (private / "metrics.ipc.journal").write_bytes(b"tapes journal\n\0\0\0\0\0\0\0\1\1")
    elif host != "no journal":
        journal_in(private, monkeypatch, host, worker_of=worker_of)
    age(private, ago)
    sweep()
    assert private.exists() is not swept


def test_one_young_file_keeps_a_directory(private, monkeypatch):
    """It may be the spooled update of a worker, or the lock of a process that starts an aggregator."""
    journal_in(private, monkeypatch, ELSEWHERE)
    age(private, 2 * HOUR)
    os.utime(private / "metrics.ipc.lock")
    sweep()
    assert private.exists()


def test_a_directory_from_the_future_is_swept_in_time(private, monkeypatch):
    """The clock was set back: from now on it is as old as if it were made now."""
    journal_in(private, monkeypatch, ELSEWHERE)
    age(private, -1000 * HOUR)
    sweep()
    assert private.exists()
    assert all(path.stat().st_mtime < time.time() + 5 for path in (private, *private.iterdir()))
    age(private, 1.1 * HOUR)
    sweep()
    assert not private.exists()


def test_a_directory_of_a_living_aggregator_is_kept_whatever_its_age(private, monkeypatch):
    """It holds its lock, which is the same in every namespace."""
    journal_in(private, monkeypatch, ELSEWHERE)
    age(private, 5 * HOUR)
    with (private / "metrics.ipc.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep()
        assert private.exists()
    sweep()
    assert not private.exists()
