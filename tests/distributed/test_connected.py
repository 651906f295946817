"""Registries in real processes, connected to a real aggregator: exact counts."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time

import msgpack
import pytest
import zmq

import tapes
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.errors import AggregatorUnavailable, InvalidArgument
from tapes.exposition.endpoint import answer
from tests.processes import (
    clean_environment,
    connected,
    free_port,
    get,
    mentions,
    run_python,
    running,
    wait_for,
    zmq_context,
)

SERVICE = """
import os, signal, sys, time
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.reporting.http import HTTPReporter

registry = DistributedRegistry("ipc://m.ipc")
counter, timer = registry.counter("c"), registry.timer("my.timer")
aggregator = RegistryAggregator(HTTPReporter(int(sys.argv[1])), "ipc://m.ipc")
aggregator.start()
pids = []
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        registry.connect()
        for _ in range(1000):
            counter.increment()
            with timer.time():
                pass
        registry.gauge("g", merge="each").set(number)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.pause()
    pids.append(pid)

def end(*_):
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    for pid in pids:
        os.waitpid(pid, 0)
    aggregator.stop()
    os._exit(0)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
while True:
    signal.pause()
"""


FOREGROUND = (
    "from tapes.distributed.registry import *; RegistryAggregator([], 'ipc://m.ipc').start(fork=False)"
)


@pytest.fixture
def service(short_dir):
    """Four workers that have counted 1,000 each, and the port of their HTTPReporter."""
    port = free_port()
    with running([sys.executable, "-W", "error", "-c", SERVICE, str(port), "4"], cwd=short_dir) as process:
        yield process, port, short_dir


def stats(port):
    return json.loads(get(port, "/metrics")[2])


def test_an_http_reporter_gives_the_merged_values(service):
    """Four times 1,000, in the aggregator's own process, started before the fork."""
    _, port, _ = service

    def complete():
        found = stats(port)
        timed = found.get("my", {}).get("timer", {}).get("count")
        all_in = found.get("c", {}).get("value") == timed == 4000 and len(found.get("g", {})) == 4
        return found if all_in else None

    gauges = wait_for(complete, "all is merged")["g"]
    assert sorted(one["value"] for one in gauges.values()) == [0, 1, 2, 3]
    assert get(port, "/")[2].startswith(b"{")
    assert get(port, "/nothing")[0] == 404
    assert get(port, "/metrics", "HEAD")[0] == 200
    assert b"my_timer_seconds_count 4000" in get(port, "/metrics", Accept="text/plain")[2]
    assert get(port, "/metrics?format=yaml")[0] == 400


def test_sockets_are_private(service):
    """Nobody else may connect."""
    _, port, short_dir = service
    wait_for(lambda: stats(port), "the service is up")
    for name in ("m.ipc", "m.ipc.read", "m.ipc.lock"):
        assert stat.S_IMODE((short_dir / name).stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_within_four_seconds(service, number):
    """However the parent ends: the aggregator leaves with it, and so do its files."""
    process, port, short_dir = service
    wait_for(lambda: stats(port).get("c", {}).get("value") == 4000, "all is merged")
    workers = [pid for pid in mentions(str(short_dir)) if pid != process.pid]
    process.send_signal(number)
    process.wait(5)
    if number == signal.SIGKILL:  # nobody is left to end the workers
        watched = [pid for pid in workers if b"signal.pause" in _cmdline(pid)]
        wait_for(lambda: list(short_dir.iterdir()) == [short_dir / "output.log"], "no file is left", 4)
        for pid in watched:
            if pid in mentions(str(short_dir)):
                os.kill(pid, signal.SIGKILL)
    wait_for(lambda: mentions(str(short_dir)) == [], "no process is left", 4)
    wait_for(lambda: list(short_dir.iterdir()) == [short_dir / "output.log"], "no file is left", 4)
    assert (short_dir / "output.log").read_text() == ""


def _cmdline(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


@pytest.fixture
def aggregator(short_dir):
    """The address of an aggregator in a process of its own, which ends with the test."""
    with running([sys.executable, "-c", FOREGROUND], cwd=short_dir) as process:
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        yield f"ipc://{short_dir}/m.ipc", process


@pytest.mark.alone
def test_an_update_is_visible_to_others_in_time(aggregator):
    """Within 0.5 s of the event, without anybody flushing, unless the machine has no time for it."""
    address, _ = aggregator
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


def test_what_was_counted_before_connect_and_before_the_aggregator_arrives(short_dir):
    """A worker may come first."""
    address = f"ipc://{short_dir}/m.ipc"
    early = DistributedRegistry(address)
    early.counter("c").increment(7)
    early.connect()
    with pytest.raises(AggregatorUnavailable, match="did not answer"):
        early.get_stats()
    with running([sys.executable, "-c", FOREGROUND], cwd=short_dir):
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        late = DistributedRegistry(address)
        late.connect()
        wait_for(lambda: late.get_stats().get("c", {}).get("value") == 7, "the keyframe arrives")
        early.close()
        assert late.get_stats().c.value == 7
        late.close()


def test_a_worker_that_closes_has_said_all(aggregator):
    """The goodbye carries the last values; the counts stay, the gauges leave."""
    address, _ = aggregator
    with connected(address) as reader:
        for _ in range(20):
            worker = DistributedRegistry(address)
            worker.connect()
            worker.counter("c").increment(5)
            worker.gauge("g").set(1)
            worker.close()
        assert reader.get_stats().c.value == 100
        assert reader.snapshot().get("g") is None


def test_leaving_and_coming_back_counts_everything_once(aggregator):
    """close() hands over, so a second connect() starts from zero; gauges stay."""
    address, _ = aggregator
    registry = DistributedRegistry(address)
    for turn in range(1, 4):
        registry.connect()
        registry.connect()
        for kind, record in (("counter", "increment"), ("meter", "mark"), ("histogram", "update")):
            getattr(getattr(registry, kind)(kind[0]), record)(5)
        registry.timer("t").update(5)
        registry.gauge("g").set(turn)
        stats = registry.get_stats()
        assert (stats.c.value, stats.m["count"], stats.h["count"], stats.t["count"]) == (
            5 * turn, 5 * turn, turn, turn,
        )  # fmt: skip
        assert stats.g.value == turn
        registry.close()
        assert registry.get_stats().c.value == 0
        assert registry.get_stats().g.value == turn


def test_bad_values_found_while_leaving_are_counted(aggregator):
    """The goodbye folds what is pending, and carries the count of what it found."""
    address, _ = aggregator
    with connected(address) as worker:
        worker.histogram("h").update("bad")
        assert worker.get_stats().tapes.rejected.value == 1
        worker.histogram("h").update("bad again")
        worker.meter("m").mark("bad too")
    with connected(address) as reader:
        assert reader.get_stats().tapes.rejected.value == 3


def test_a_goodbye_that_nobody_heard_is_said_by_the_next_connection(aggregator):
    """Nothing is lost, and nothing counted twice, whether the first one arrived or not."""
    address, process = aggregator
    with connected(address) as registry:
        registry.counter("c").increment(5)
        assert registry.get_stats().c.value == 5
        registry.counter("c").increment(2)
        process.send_signal(signal.SIGSTOP)
        try:
            registry.close()
        finally:
            process.send_signal(signal.SIGCONT)
        registry.counter("c").increment(3)
        registry.connect()
        assert registry.get_stats().c.value == 10


def test_connecting_from_many_threads_is_one_connection(aggregator):
    """Not one for each, with its own copy of the counts."""
    address, _ = aggregator
    registry = DistributedRegistry(address)
    registry.counter("c").increment(5)
    barrier = threading.Barrier(8)

    def connect():
        barrier.wait()
        registry.connect()

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.get_stats().c.value == 5
    assert sum(thread.name == "tapes-publisher" for thread in threading.enumerate()) == 1
    registry.close()


def test_another_address_while_connected_is_refused(aggregator, monkeypatch):
    """Rather than ignored."""
    address, _ = aggregator
    monkeypatch.setattr(tapes.default_registry, "connection", None)
    tapes.connect(address)
    tapes.connect(address)
    with pytest.raises(InvalidArgument, match="close"):
        tapes.connect(address + "2")
    tapes.close()


def test_closing_while_others_read_gives_them_typed_errors(aggregator):
    """An answer, or AggregatorUnavailable; afterwards the local values."""
    address, _ = aggregator
    with connected(address) as registry:
        registry.counter("c").increment()
        started, troubles = threading.Event(), []

        def read():
            while registry.connection is not None:
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


def test_an_answer_of_another_version_is_an_unavailable_aggregator(short_dir):
    """Also for /metrics, which says 503."""
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


def test_a_blocking_producer_holds_nobody_up(aggregator):
    """Reads and the goodbye are bounded in time."""
    address, _ = aggregator
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


def test_a_child_does_not_stop_its_parents_aggregator(short_dir):
    """stop() in a fork is nothing."""
    done = run_python(
        """
import os
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
aggregator = RegistryAggregator([], "ipc://m.ipc")
aggregator.start()
if os.fork() == 0:
    aggregator.stop()
    os._exit(0)
os.wait()
registry = DistributedRegistry("ipc://m.ipc")
registry.counter("c").increment()
registry.connect()
assert registry.get_stats().c.value == 1
registry.close()
aggregator.stop()
""",
        cwd=short_dir,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(short_dir.iterdir()) == []


def test_a_process_that_just_ends_says_goodbye(aggregator, short_dir):
    """Leaving the interpreter is enough."""
    address, _ = aggregator
    done = run_python(
        f"""
from tapes import DistributedRegistry
registry = DistributedRegistry({address!r})
registry.connect()
registry.counter("c").increment(3)
""",
        cwd=short_dir,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with connected(address) as reader:
        assert reader.get_stats().c.value == 3


def test_a_multiprocessing_child_that_returns_says_goodbye(aggregator, short_dir):
    """Though it runs no atexit functions: 20 children that live for milliseconds."""
    address, _ = aggregator
    (short_dir / "children.py").write_text(f"""
import multiprocessing
from tapes import DistributedRegistry

registry = DistributedRegistry({address!r})

def work():
    registry.connect()
    registry.counter("c").increment(5)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work) for _ in range(20)]
    for child in children:
        child.start()
    for child in children:
        child.join()
""")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "children.py"], cwd=short_dir, env=clean_environment(),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    with connected(address) as reader:
        assert reader.get_stats().c.value == 100


def test_a_missing_aggregator_is_said_once(short_dir, caplog, monkeypatch):
    """Also if nobody reads."""
    monkeypatch.setattr("tapes.distributed.worker.publisher._LONELY_SECONDS", 0.05)
    registry = DistributedRegistry(f"ipc://{short_dir}/m.ipc")
    registry.connect()
    wait_for(lambda: "no aggregator" in caplog.text, "the warning")
    registry.close()
    assert caplog.text.count("no aggregator") == 1


def test_a_killed_worker_keeps_what_it_had_published(aggregator, short_dir):
    """Its counts are retired, its gauges leave."""
    address, _ = aggregator
    program = f"""
import os, signal
from tapes import DistributedRegistry
registry = DistributedRegistry({address!r})
registry.connect()
registry.counter("c").increment(3)
registry.gauge("g").set(1)
registry.get_stats()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(program, cwd=short_dir).returncode == -signal.SIGKILL
    with connected(address) as reader:
        assert reader.get_stats().c.value == 3
        wait_for(lambda: reader.snapshot().get("g") is None, "the gauge of the dead leaves")
        assert reader.get_stats().c.value == 3


@pytest.mark.alone
def test_no_answer_is_an_error_within_its_timeout_and_the_next_one_works(aggregator):
    """A stopped aggregator, then one that goes on: no reader is wedged."""
    address, process = aggregator
    with connected(address) as registry:
        registry.counter("c").increment()
        assert registry.get_stats().c.value == 1
        process.send_signal(signal.SIGSTOP)
        try:
            times = []
            for _ in range(2):  # the machine may be busy
                started = time.monotonic()
                with pytest.raises(AggregatorUnavailable, match=r"answer within 1 s.*RegistryAggregator"):
                    registry.get_stats()
                times.append(time.monotonic() - started)
            assert min(times) < 1.5
        finally:
            process.send_signal(signal.SIGCONT)
        registry.counter("c").increment()
        assert registry.get_stats().c.value == 2


def test_strangers_change_nothing_and_are_counted(aggregator):
    """Garbage, pickles and well-formed nonsense, on both sockets."""
    address, _ = aggregator
    with connected(address) as registry, zmq_context() as context:
        registry.counter("c").increment(5)
        evil = pickle.dumps(os.system)
        messages = [b"", b"\xc1", evil, os.urandom(1000), msgpack.packb([1, "Update", 1]), msgpack.packb({})]
        publisher, dealer = context.socket(zmq.XPUB), context.socket(zmq.DEALER)
        publisher.connect(address)
        dealer.connect(address + ".read")
        publisher.recv()  # the subscription: messages are not dropped on our side
        for message in messages:
            publisher.send(message)
            dealer.send(message)
            dealer.send_multipart([b"", message, b""])
        wait_for(
            lambda: (s := registry.snapshot().get("tapes.rejected")) and s.value == 3 * len(messages),
            "every message is counted",
        )
        assert registry.get_stats().c.value == 5


def test_kinds_that_differ_between_workers_break_nothing(aggregator):
    """The first kind stands, the other is counted."""
    address, _ = aggregator
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_aggregator_in_the_foreground_ends_cleanly(short_dir, number):
    """ctrl-C and SIGTERM: status 0, no word, no file."""
    with running([sys.executable, "-c", FOREGROUND], cwd=short_dir) as process:
        with connected(f"ipc://{short_dir}/m.ipc") as reader:
            wait_for(reader.get_stats, "the aggregator answers")
        process.send_signal(number)
        assert process.wait(4) == 0
    assert [path.name for path in short_dir.iterdir()] == ["output.log"]
    assert (short_dir / "output.log").read_text() == ""


CANNOT_BIND = {
    "another aggregator": ("first.start(); second.start({fork})", "another aggregator (pid "),
    "not a socket": ("open('m.ipc', 'w').close(); first.start({fork})", "not a socket"),
    "no directory": ("RegistryAggregator([], 'ipc://nowhere/m.ipc').start({fork})", "directory that exists"),
    "path too long": ("RegistryAggregator([], 'ipc://' + 'x' * 200)", "at most 107"),
    "port in use": ("RegistryAggregator(HTTPReporter(port), 'ipc://n.ipc').start({fork})", "another port"),
    "started twice": ("first.start(); first.start({fork})", "called before"),
}


@pytest.mark.parametrize("case", CANNOT_BIND)
@pytest.mark.parametrize("fork", ["fork=True", "fork=False"])
def test_an_aggregator_that_cannot_bind_says_so_in_one_sentence(short_dir, case, fork):
    """What is wrong and what to do, as one line; and nothing is left."""
    code, expected = CANNOT_BIND[case]
    program = f"""
import socket, sys
from tapes import TapesError
from tapes.distributed.registry import RegistryAggregator
from tapes.reporting.http import HTTPReporter
first, second = RegistryAggregator([], "ipc://m.ipc"), RegistryAggregator([], "ipc://m.ipc")
with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    try:
        {code.format(fork=fork)}
    except TapesError as error:
        sys.exit(f"tapes: {{error}}")
    finally:
        first.stop()
        second.stop()
"""
    done = run_python(program, cwd=short_dir)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert expected in done.stderr
    left = [path.name for path in short_dir.iterdir()]
    assert left == (["m.ipc"] if case == "not a socket" else [])
    assert mentions(str(short_dir)) == []


def test_reporters_are_checked():
    """A common slip: a registry, or a class."""
    for wrong in ([object()], 5, RegistryAggregator, tapes.default_registry):
        with pytest.raises(InvalidArgument, match="Reporter"):
            RegistryAggregator(wrong)


def test_several_read_at_once_and_an_event_loop_goes_on(reader, address):
    """Threads and tasks; each sees what was recorded here before."""
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


def test_an_event_loop_of_trio_can_read_too(address):
    """If anyio is there, which knows both."""
    anyio = pytest.importorskip("anyio")
    pytest.importorskip("trio")
    worker = DistributedRegistry(address)
    worker.connect()
    worker.counter("c").increment(3)
    assert anyio.run(worker.get_stats_async, backend="trio").c.value == 3
    worker.close()
