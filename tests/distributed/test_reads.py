"""Reads of a connected registry: they see all events, and answer or fail in time."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import msgpack
import pytest
import zmq

from tapes.distributed.registry import DistributedRegistry
from tapes.errors import AggregatorUnavailable
from tapes.exposition.endpoint import answer
from tests.processes import connected, wait_for, zmq_context


@pytest.mark.alone
def test_an_update_is_visible_to_others_in_time(address):
    """An event is visible to other processes within 0.5 s, although no process flushes."""
    writer, reader = DistributedRegistry(address), DistributedRegistry(address)
    writer.connect()
    reader.connect()
    times = []
    for number in range(1, 6):
        started = time.monotonic()
        writer.counter("c").increment()
        wait_for(lambda n=number: reader.snapshot().get("c", labels={}) is not None
                 and reader.snapshot().get("c").value == n, "the event is visible")  # fmt: skip
        times.append(time.monotonic() - started)
    assert min(times) < 0.5
    writer.close()
    reader.close()


@pytest.mark.alone
def test_a_read_without_an_answer_fails_within_its_timeout_and_later_ones_work(address, aggregator):
    """A read of a stopped aggregator fails after 1 s; when the aggregator continues, reads work again."""
    with connected(address) as registry:
        registry.counter("c").increment()
        assert registry.get_stats().c.value == 1
        aggregator.send_signal(signal.SIGSTOP)
        try:
            times = []
            for _ in range(2):  # the machine may be busy
                started = time.monotonic()
                with pytest.raises(AggregatorUnavailable, match=r"answer within 1 s.*RegistryAggregator"):
                    registry.get_stats()
                times.append(time.monotonic() - started)
            assert min(times) < 1.5
        finally:
            aggregator.send_signal(signal.SIGCONT)
        registry.counter("c").increment()
        assert registry.get_stats().c.value == 2


def test_a_reply_of_an_unknown_version_makes_metrics_a_503(short_dir):
    """A reply of an unknown protocol version is like no reply: ``/metrics`` answers 503."""
    address = f"ipc://{short_dir}/m.ipc"
    with connected(address) as registry, zmq_context() as context:
        router = context.socket(zmq.ROUTER)
        router.bind(address + ".read")
        answer_once = threading.Thread(
            target=lambda: router.send_multipart([router.recv_multipart()[0], msgpack.packb([2, "Reply"])])
        )
        answer_once.start()
        assert answer(registry)[0] == 503
        answer_once.join()


def test_reads_during_close_get_an_answer_or_aggregator_unavailable(address):
    """Threads that read while another one closes get an answer or AggregatorUnavailable, and nothing else."""
    with connected(address) as registry:
        registry.counter("c").increment()
        started, troubles = threading.Event(), []

        def read():
            while registry.session.is_connected:
                try:
                    registry.get_stats()
                except AggregatorUnavailable:
                    pass
                except Exception as error:
                    troubles.append(error)
                started.set()

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        started.wait()
    for reader in readers:
        reader.join()
    assert troubles == []


def test_a_producer_that_blocks_delays_reads_and_close_by_seconds_only(address):
    """A gauge producer that never returns delays reads and close() for a bounded time only."""
    registry = DistributedRegistry(address)
    entered, released = threading.Event(), threading.Event()

    def block():
        entered.set()
        released.wait(20)
        return 1

    registry.counter("c").increment(3)
    registry.connect()
    assert registry.get_stats().c.value == 3
    registry.gauge("slow", block)
    entered.wait(5)
    registry.counter("c").increment()
    started = time.monotonic()
    assert registry.get_stats().c.value == 4
    registry.close()
    assert time.monotonic() - started < 10
    released.set()
    wait_for(lambda: "tapes-publisher" not in {t.name for t in threading.enumerate()}, "the thread ends")


def test_a_name_of_two_kinds_shows_the_newest_workers_kind(address):
    """If two workers use one name for different kinds, the newest worker's is shown and the other counted."""
    one, two = DistributedRegistry(address), DistributedRegistry(address)
    one.connect()
    one.counter("x").increment()
    one.get_stats()
    two.connect()
    two.meter("x").mark(5)
    two.counter("y").increment(2)
    stats = two.get_stats()
    assert (stats.x["count"], stats.y.value) == (5, 2)
    assert stats.tapes.rejected.value >= 1
    one.close()
    two.close()


def test_threads_and_tasks_read_at_once_and_the_event_loop_keeps_running(reader, address):
    """Threads and tasks read at once, each sees its own events, and the event loop keeps running."""
    worker = DistributedRegistry(address)
    worker.connect()
    seen = []

    def read():
        for number in range(20):
            worker.counter("reads").increment()
            seen.append(worker.get_stats().reads.value > number)

    async def main():
        turns = 0
        task = asyncio.gather(*(worker.get_stats_async() for _ in range(10)))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return turns, await task

    threads = [threading.Thread(target=read) for _ in range(5)]
    for thread in threads:
        thread.start()
    turns, stats = asyncio.run(main())
    for thread in threads:
        thread.join()
    assert turns > 10
    assert seen == [True] * 100
    assert len(stats) == 10
    assert worker.get_stats().reads.value == reader.get_stats().reads.value == 100
    worker.close()


def test_get_stats_async_works_in_trio(address):
    """get_stats_async() works in an event loop of trio, by anyio."""
    anyio = pytest.importorskip("anyio")
    pytest.importorskip("trio")
    worker = DistributedRegistry(address)
    worker.connect()
    worker.counter("c").increment(3)
    assert anyio.run(worker.get_stats_async, backend="trio").c.value == 3
    worker.close()
