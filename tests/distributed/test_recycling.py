"""Workers that start and exit all the time: what they leave is bounded, and reads stay as they were."""

from __future__ import annotations

from tapes.distributed.registry import DistributedRegistry
from tests.processes import run_python, wait_for

WORKERS = """
import sys, tapes
from tapes import DistributedRegistry
for number in range({first}, {last}):
    worker = DistributedRegistry({address!r})
    worker.connect()
    for own in range(20):
        worker.counter("own", worker=number, n=own).increment()
        worker.histogram("size", n=own).update(number)
    worker.gauge("g", worker=number).set(1)
    worker.close()
"""


def test_a_thousand_workers_leave_nothing_but_their_counts(reader, address, short_dir):
    """After 1,000 workers with label sets of their own, all events count and memory and files are bounded."""
    files = _files_but_the_journal(short_dir)

    def live(first, last):
        done = run_python(WORKERS.format(first=first, last=last, address=address), cwd=short_dir, seconds=100)
        assert (done.returncode, done.stderr) == (0, "")

    live(0, 200)
    before = reader.get_stats().tapes.aggregator.memory.value
    live(200, 1000)
    snapshot = reader.snapshot()
    own = snapshot.series("own")
    assert len(own) == 2001
    assert sum(series.value for series in own) == 20_000
    assert snapshot.get("own", overflow="true").value == 18_000
    assert [series.lifetime.count for series in snapshot.series("size")] == [1000] * 20
    assert snapshot.series("g") == ()
    stats = reader.get_stats()
    assert stats.tapes.workers['{state="retired"}'].value == 1000
    assert stats.tapes.workers['{state="live"}'].value == 1
    assert stats.tapes.aggregator.memory.value < before + 10 * 2**20
    wait_for(lambda: _files_but_the_journal(short_dir) == files, "no file per worker")
    assert len(list(short_dir.iterdir())) <= len(files) + 3


def test_overflowing_label_sets_of_live_workers_count_exactly(reader, address, short_dir):
    """Events of label sets beyond max_series count exactly, while their workers run and after their exit."""
    workers = [DistributedRegistry(address) for _ in range(3)]
    for number, worker in enumerate(workers):
        worker.connect()
        for label in range(1000):
            worker.counter("c", w=number, label=label).increment()
        wait_for(worker.get_stats, "all label sets are merged")
        for label in range(1000):
            worker.counter("c", w=number, label=label).increment()
        wait_for(worker.get_stats, "all label sets are merged")
    assert len(reader.snapshot().series("c")) == 2001
    assert reader.snapshot().get("c", overflow="true").value == 2000
    for worker in workers:
        worker.close()
    assert sum(series.value for series in reader.snapshot().series("c")) == 6000
    assert len(reader.snapshot().series("c")) == 2001
    # The limit is the largest one of all workers.
    generous = DistributedRegistry(address, max_series=5000)
    generous.connect()
    for label in range(3000):
        generous.counter("d", label=label).increment()
    assert len(wait_for(lambda: generous.snapshot().series("d"), "all label sets are merged")) == 3000
    generous.close()


def _files_but_the_journal(directory):
    return sorted(path.name for path in directory.iterdir() if ".journal" not in path.name)
