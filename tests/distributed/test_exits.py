"""Processes that exit in every way: each of their events counts once, with and without an aggregator."""

from __future__ import annotations

import signal
import threading

import pytest
import zmq

from tapes.distributed.protocol.messages import Reply
from tapes.distributed.protocol.wire import encode
from tapes.distributed.registry import DistributedRegistry
from tests.distributed.forking import FORK, assert_counted, run, value
from tests.processes import wait_for, zmq_context

CHILDREN = """
import multiprocessing, os, sys, tapes

def work(number):
    tapes.counter("c").increment(5)
    if number % 2:
        sys.exit(0)

if __name__ == "__main__":
    {connect}
    tapes.counter("c").increment(7)
    context = multiprocessing.get_context({method!r})
    children = [context.Process(target=work, args=(n,)) for n in range({number})]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0, child.exitcode
    tapes.counter("c").increment(3)
"""


@pytest.mark.parametrize("how", ["connected", "TAPES_ADDR"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_are_counted_at_their_exit(address, reader, short_dir, method, how):
    """Multiprocessing children of every start method connect without a call and are counted at their exit."""
    connect = f"tapes.connect({address!r})" if how == "connected" else ""
    environment = {} if how == "connected" else {"TAPES_ADDR": address}
    run(CHILDREN.format(method=method, connect=connect, number=6), short_dir, **environment)
    assert_counted(reader, 40)


@pytest.mark.timeout(300)
def test_children_that_run_for_milliseconds_are_counted(address, reader, short_dir):
    """400 children that run for milliseconds are all counted, whether their parent is connected or not."""
    program = (
        FORK.format(address=address)
        + f"""
for _ in range(10):
    ends(*(child(lambda: counter.increment(1)) for _ in range(20)))
tapes.connect({address!r})
for _ in range(10):
    pids = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            counter.increment(1000)
            sys.exit(0)
        pids.append(pid)
    ends(*pids)
"""
    )
    run(program, short_dir, seconds=240)
    assert_counted(reader, 7 + 200 + 200_000)


def test_workers_that_return_exit_close_or_are_killed_are_counted(address, reader, short_dir):
    """A return, sys.exit(), close() and a SIGKILL after a publication lose no event."""
    program = f"""
import multiprocessing, os, signal, sys, time, tapes
tapes.connect({address!r})

def work(how):
    tapes.counter("c").increment(1000)
    if how == "sys.exit":
        sys.exit(0)
    if how == "close":
        tapes.close()
        os._exit(0)
    if how == "kill":
        tapes.get_stats()  # a read publishes the events
        os.kill(os.getpid(), signal.SIGKILL)

ways = ("return", "sys.exit", "close", "kill")
fork = multiprocessing.get_context("fork")  # the other start methods import this program again
children = [fork.Process(target=work, args=(way,)) for way in ways]
for child in children:
    child.start()
for child in children:
    child.join()
assert sorted(child.exitcode for child in children) == [-signal.SIGKILL, 0, 0, 0]
"""
    run(program, short_dir)
    assert_counted(reader, 4000)


def test_last_values_are_left_in_a_file_for_the_next_aggregator(short_dir, start_aggregator):
    """If no aggregator replies to a goodbye, a private file keeps its values, which the next one counts."""
    address = f"ipc://{short_dir}/m.ipc"
    early = DistributedRegistry(address)
    early.connect()
    early.counter("c").increment(7)
    early.close()
    (left,) = short_dir.glob("m.ipc.spool-*")
    assert left.stat().st_mode & 0o077 == 0
    (short_dir / "m.ipc.spool-strange").write_bytes(b"garbage")
    with start_aggregator() as process:
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        late = DistributedRegistry(address)
        late.connect()
        wait_for(lambda: value(late) == 7, "the file is read")
        assert late.get_stats().tapes.rejected.value == 1
        assert list(short_dir.glob("*.spool-*")) == []
        process.send_signal(signal.SIGSTOP)
        late.counter("c").increment(3)
        late.close()
        assert len(list(short_dir.glob("*.spool-*"))) == 1
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: not list(short_dir.glob("*.spool-*")), "the running aggregator reads the file")
        late.connect()
        assert late.get_stats().c.value == 10
        late.close()


def test_a_refused_goodbye_is_left_in_a_file(short_dir):
    """If the aggregator refuses a goodbye, the goodbye is left in a file."""
    address = f"ipc://{short_dir}/m.ipc"
    with zmq_context() as context:
        router = context.socket(zmq.ROUTER)
        router.bind(address + ".read")
        refusal = encode(Reply(0, "error", b"no"))
        refuse = threading.Thread(target=lambda: router.send_multipart([router.recv_multipart()[0], refusal]))
        refuse.start()
        registry = DistributedRegistry(address)
        registry.connect()
        registry.counter("c").increment()
        registry.close()
        refuse.join()
    assert len(list(short_dir.glob("*.spool-*"))) == 1
