"""Clients that are no workers send to a running service: nothing changes, and every message is counted.

Each published frame counts, because an update is one frame. Each request counts once, whatever envelope it
has: its last frame is the request, and the frames before it are the way back. Bytes that are no ZMTP, of any
version, are no message and do not count.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import stat

import msgpack
import pytest
import zmq

from tapes.distributed.protocol import messages
from tapes.distributed.protocol.messages import Goodbye, HandOver, Item, Update
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.processes import Process, process_of
from tapes.registry import Registry
from tests.crew import assert_all_counted, crew, resident, stopped
from tests.processes import connected, wait_for, zmq_context

MEGABYTE = 2**20


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def service(short_dir):
    """A service of two workers that count all the time, and a reader; in the end the counts are exact."""
    with crew(short_dir) as found:
        one, two, reader = (found.start_worker() for _ in range(3))
        one.call("start_load")
        two.call("start_load")
        found.reader = reader
        try:
            yield found
            one.call("stop_load")
            two.call("stop_load")
            assert_all_counted(reader, found.workers)
            for worker in found.workers:
                worker.exit()
        finally:
            print(found.log.read_text(errors="replace")[-5000:])


@contextlib.contextmanager
def sockets(service, *kinds):
    """Return 0MQ sockets that are connected to the service: XPUB to its address, others to ``.read``."""
    with zmq_context() as context:
        made = []
        for kind in kinds:
            made.append(context.socket(kind))
            made[-1].connect(service.address + ("" if kind == zmq.XPUB else ".read"))
            if kind == zmq.XPUB:
                while made[-1].recv() != b"\x01":  # before the subscription arrives, messages are dropped
                    pass
        yield made


def update(identity=b"s" * 16, base=0):
    """Return a valid update from a process that is no worker of the service."""
    registry = Registry()
    registry.counter("c").increment(1000)
    registry.counter("foreign").increment(1000)
    items = [Item(*series) for series in registry.collect()]
    return Update(identity, process_of(os.getpid()), "elsewhere", base + 1, base, items, {})


def garbage(trap):
    """Return messages that are not of the protocol, whatever their sender."""
    packed, large = encode(update()), 5 * MEGABYTE
    return [
        b"", b"\x00", b"\xc1", b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), pickle.dumps(trap),
        pickle.dumps(trap, 0), packed[:-1], packed + b"\x00", b"\x93" * 1000, msgpack.packb({}),
        msgpack.packb([VERSION, "Update", 1]), msgpack.packb([VERSION + 1, "Update", 1]),
        msgpack.packb([VERSION, "Update", *([pickle.dumps(trap)] * 9)]), msgpack.packb([0, "Read", 1]),
        bytes(large), os.urandom(large), msgpack.packb([VERSION, "Update", b"x" * large]),
        msgpack.packb([VERSION, "Attach", 1, "h", [[1, 2]] * 500_000]),
    ]  # fmt: skip


def wrong_types():
    """Return valid messages that no client may send, and those that belong to the other socket."""
    nowhere = [
        messages.Reply(1, "ok", b""), messages.Merged(5, update().items, {}),
        messages.Journal("h", (), (), 5, (), {}, 2000),
        messages.Retired(update(bytes(16)).items),
    ]  # fmt: skip
    questions = [
        messages.Read(1, "json", update()), messages.Attach(1, "h", (Process(1, 1),)), Goodbye(1, update()),
        HandOver(1, VERSION + 1),
    ]  # fmt: skip
    return [encode(one) for one in nowhere], [encode(one) for one in questions]


def rejected(service):
    """Return how many messages the aggregator has rejected."""
    return service.reader.call("read")["tapes"].get("rejected", {}).get("value", 0)


def assert_rejected(service, before, number):
    """Wait until exactly ``number`` more messages are rejected than ``before``."""
    wait_for(lambda: rejected(service) >= before + number, f"{number} are rejected")
    assert rejected(service) == before + number


def test_messages_that_are_not_of_the_protocol_are_rejected_and_counted(service, short_dir):
    """Garbage, pickles, large frames and misplaced messages are rejected and counted, on both sockets.

    No pickle is loaded, memory stays, and the aggregator goes on.
    """
    trap = short_dir / "touched"
    odd, (nowhere, questions) = garbage(Trap(trap)), wrong_types()
    aggregator, memory = service.aggregator, []
    with sockets(service, zmq.XPUB, zmq.DEALER, zmq.REQ) as (publisher, dealer, req):
        for _ in range(4):
            before = rejected(service)
            published = [*odd, *nowhere, *questions]
            asked = [*odd, *nowhere, encode(update())]
            for message in published:
                publisher.send(message)
            for message in asked:
                dealer.send(message)
                req.send(message)
                answers = decode(dealer.recv()), decode(req.recv())
                assert {answer.status for answer in answers} == {"error"}
            assert_rejected(service, before, len(published) + 2 * len(asked))
            memory.append(resident(aggregator))
    print("memory after each round:", memory)
    assert memory[-1] < memory[0] + 15 * MEGABYTE  # 240 MB came in large frames
    assert not trap.exists()
    assert service.aggregator == aggregator
    assert "foreign" not in service.reader.call("names")


def test_frames_of_a_published_message_count_one_by_one(service):
    """Every frame of a published message counts; of a request only the last one, and the others come back."""
    aggregator, before = service.aggregator, rejected(service)
    with sockets(service, zmq.XPUB, zmq.DEALER) as (publisher, dealer):
        publisher.send_multipart([b"one", b"", encode(Goodbye(1, update()))])
        dealer.send_multipart([b"one", b"", b"three"])
        dealer.send_multipart([encode(update())] * 100)
        *envelope, answer = dealer.recv_multipart()
        assert envelope == [b"one", b""]
        assert decode(answer).status == "error"
        assert len(dealer.recv_multipart()) == 100
        assert_rejected(service, before, 3 + 1 + 1)
    assert service.aggregator == aggregator


@pytest.mark.parametrize("version", [VERSION, 0])
def test_a_client_of_the_same_or_an_older_version_cannot_replace_the_aggregator(service, version):
    """An aggregator refuses a hand-over to a version that is not newer, and stays."""
    aggregator, before = service.aggregator, rejected(service)
    with sockets(service, zmq.DEALER) as (dealer,):
        dealer.send(encode(HandOver(7, version)))
        answer = decode(dealer.recv())
    assert (answer.correlation, answer.status) == (7, "error")
    assert rejected(service) == before
    assert service.aggregator == aggregator


@pytest.mark.alone
def test_connections_that_are_no_zmtp_change_nothing(service):
    """Connections that send no ZMTP, half a greeting or nothing change nothing; a ZMTP 1.0 message counts."""
    aggregator, before = service.aggregator, rejected(service)
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01NULL" + bytes(48)
    words = [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 65536, greeting[:11], greeting]
    oldest = b"\x01\x00" + b"\x04\x00abc"  # no identity; one message
    memory = resident(aggregator)
    with contextlib.ExitStack() as stack:
        for path in ("m.ipc", "m.ipc.read"):
            for sent in [*words * 5, oldest]:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.settimeout(5)
                client.connect(str(service.directory / path))
                with contextlib.suppress(OSError):  # the aggregator may have closed the connection
                    client.sendall(sent)
        assert_rejected(service, before, 2)
        new = service.start_worker()
        assert new.call("read")["seconds"] < 1.2
        assert new.exit() < 3
        service.workers.remove(new)
        assert rejected(service) == before + 2
    assert resident(aggregator) < memory + 4 * MEGABYTE
    assert service.aggregator == aggregator


def test_only_the_user_can_access_the_files_whatever_the_umask_is(short_dir):
    """All files of a service are accessible only for its user, even if the application's umask is 0."""
    place = short_dir / "tapes-1-2"
    with crew(short_dir, place) as service:
        service.socket = "metrics.ipc"
        one = service.start_worker(["sh", "-c", 'umask 0; exec "$@"', "sh"])
        one.call("fork_children", 3, 10)
        two = service.start_worker(["sh", "-c", 'umask 0; exec "$@"', "sh"])
        two.call("count", 10)
        wait_for((place / "metrics.ipc.journal").exists, "there is a journal")
        with stopped(service.aggregator):
            two.exit()  # which leaves its counts in a file
            found = {path.name: path.lstat().st_mode for path in place.iterdir()}
        assert {name.partition("-")[0] for name in found} >= {
            "metrics.ipc", "metrics.ipc.read", "metrics.ipc.lock", "metrics.ipc.start", "metrics.ipc.journal",
            "metrics.ipc.spool",
        }  # fmt: skip
        for name, mode in found.items():
            assert stat.S_IMODE(mode) & ~(0o700 if stat.S_ISSOCK(mode) else 0o600) == 0, (name, oct(mode))
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        one.exit()


def test_each_invalid_message_is_counted_once_on_both_sockets(address):
    """Garbage, pickles and malformed messages on both sockets each add one to ``tapes.rejected``."""
    with connected(address) as registry, zmq_context() as context:
        registry.counter("c").increment(5)
        evil = pickle.dumps(os.system)
        sent = [b"", b"\xc1", evil, os.urandom(1000), msgpack.packb([1, "Update", 1]), msgpack.packb({})]
        publisher, dealer = context.socket(zmq.XPUB), context.socket(zmq.DEALER)
        publisher.connect(address)
        dealer.connect(address + ".read")
        publisher.recv()  # the subscription: messages are not dropped by our socket
        for message in sent:
            publisher.send(message)
            dealer.send(message)
            dealer.send_multipart([b"", message, b""])
        wait_for(
            lambda: (s := registry.snapshot().get("tapes.rejected")) and s.value == 3 * len(sent),
            "every message is counted",
        )
        assert registry.get_stats().c.value == 5
