"""Strangers at the sockets of a running service: nothing changes, and every message of theirs is counted.

What is counted: each frame that is published, as an update is one frame; and each question, whatever it is
wrapped in, as the last frame of a message is the question and those before it say where the answer goes.
Bytes that talk no ZMTP, of any version, are no message.
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

from tapes.distributed.protocol import messages as said
from tapes.distributed.protocol.messages import Goodbye, HandOver, Item, Update
from tapes.distributed.protocol.wire import VERSION, decode, encode
from tapes.processes import Process, process_of
from tapes.registry import Registry
from tests.crew import crew, resident, stopped
from tests.processes import wait_for, zmq_context

MEGABYTE = 2**20


class Trap:
    """What touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def service(short_dir):
    """Two workers that count all the time, and one that reads."""
    with crew(short_dir) as found:
        one, two, reader = (found.hire() for _ in range(3))
        one.ask("load")
        two.ask("load")
        found.reader = reader
        try:
            yield found
            one.ask("halt")
            two.ask("halt")
            told = [hand.ask("told") for hand in found.hands]
            assert [one["errors"] for one in told] == [[]] * 3
            expected = [sum(one["counted"] for one in told)] * 4
            wait_for(lambda: reader.ask("read").get("counts") == expected, "all is counted", 5)
            for hand in found.hands:
                hand.end()
        finally:
            print(found.log.read_text(errors="replace")[-5000:])


@contextlib.contextmanager
def sockets(service, *kinds):
    """0MQ sockets that are connected to the service: publishers to one of its ends, others to the other."""
    with zmq_context() as context:
        made = []
        for kind in kinds:
            made.append(context.socket(kind))
            made[-1].connect(service.address + ("" if kind == zmq.XPUB else ".read"))
            if kind == zmq.XPUB:
                while made[-1].recv() != b"\x01":  # until its subscription is here, what is sent is dropped
                    pass
        yield made


def update(identity=b"s" * 16, base=0):
    """A well-formed update of nobody in the service."""
    registry = Registry()
    registry.counter("c").increment(1000)
    registry.counter("stranger").increment(1000)
    items = [Item(*series) for series in registry.collect()]
    return Update(identity, process_of(os.getpid()), "elsewhere", base + 1, base, items, {})


def garbage(trap):
    """Messages that are none of ours, whoever sends them."""
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
    """Messages of ours that belong nowhere, and those that belong only to the other socket."""
    nowhere = [
        said.Reply(1, "ok", b""), said.Merged(5, update().items, {}),
        said.Journal("h", (), (), 5, (), {}, 2000), said.Record(update(said.NOBODY), True, (), (1, 1)),
    ]  # fmt: skip
    questions = [
        said.Read(1, "json", update()), said.Attach(1, "h", (Process(1, 1),)), Goodbye(1, update()),
        HandOver(1, VERSION + 1),
    ]  # fmt: skip
    return [encode(one) for one in nowhere], [encode(one) for one in questions]


def rejected(service):
    return service.reader.ask("read")["tapes"].get("rejected", {}).get("value", 0)


def all_is_rejected(service, before, number):
    """Wait until so many more are counted, and not one more or less."""
    wait_for(lambda: rejected(service) >= before + number, f"{number} are rejected")
    assert rejected(service) == before + number


def test_messages_that_are_none(service, short_dir):
    """Garbage, pickles, large frames and misplaced messages, over and over, on both sockets."""
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
            all_is_rejected(service, before, len(published) + 2 * len(asked))
            memory.append(resident(aggregator))
    print("memory after each round:", memory)
    assert memory[-1] < memory[0] + 15 * MEGABYTE  # of the 240 that came in large frames
    assert not trap.exists()
    assert service.aggregator == aggregator
    assert "stranger" not in service.reader.ask("names")


def test_messages_of_several_frames(service):
    """Of what is published each frame is one; of a question all frames but the last are its envelope."""
    aggregator, before = service.aggregator, rejected(service)
    with sockets(service, zmq.XPUB, zmq.DEALER) as (publisher, dealer):
        publisher.send_multipart([b"one", b"", encode(Goodbye(1, update()))])
        dealer.send_multipart([b"one", b"", b"three"])
        dealer.send_multipart([encode(update())] * 100)
        *envelope, answer = dealer.recv_multipart()
        assert envelope == [b"one", b""]
        assert decode(answer).status == "error"
        assert len(dealer.recv_multipart()) == 100
        all_is_rejected(service, before, 3 + 1 + 1)
    assert service.aggregator == aggregator


@pytest.mark.parametrize("version", [VERSION, VERSION - 1, 0])
def test_a_stranger_who_wants_it_to_make_room(service, version):
    """Nobody takes its place who is not newer: it says so, and stays. That is a question like others."""
    aggregator, before = service.aggregator, rejected(service)
    with sockets(service, zmq.DEALER) as (dealer,):
        dealer.send(encode(HandOver(7, version)))
        answer = decode(dealer.recv())
    assert (answer.correlation, answer.status) == (7, "error")
    assert rejected(service) == before
    assert service.aggregator == aggregator


def test_clients_that_do_not_talk_zmtp(service):
    """Bytes, half a greeting, silence: nothing comes of it. And ZMTP 1.0, which needs no greeting."""
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
                with contextlib.suppress(OSError):  # it may have hung up
                    client.sendall(sent)
        all_is_rejected(service, before, 2)
        new = service.hire()
        assert new.ask("read")["seconds"] < 1.2
        assert new.end() < 3
        service.hands.remove(new)
        assert rejected(service) == before + 2
    assert resident(aggregator) < memory + 4 * MEGABYTE
    assert service.aggregator == aggregator


def test_nobody_else_may_touch_the_files(short_dir):
    """Whatever the umask of the application is."""
    place = short_dir / "tapes-1-2"
    with crew(short_dir, place) as service:
        service.socket = "metrics.ipc"
        one = service.hire(["sh", "-c", 'umask 0; exec "$@"', "sh"])
        one.ask("children", 3, 10)
        two = service.hire(["sh", "-c", 'umask 0; exec "$@"', "sh"])
        two.ask("count", 10)
        wait_for((place / "metrics.ipc.journal").exists, "there is a journal")
        with stopped(service.aggregator):
            two.end()  # by a will
            found = {path.name: path.lstat().st_mode for path in place.iterdir()}
        assert {name.partition("-")[0] for name in found} >= {
            "metrics.ipc", "metrics.ipc.read", "metrics.ipc.lock", "metrics.ipc.start", "metrics.ipc.journal",
            "metrics.ipc.spool",
        }  # fmt: skip
        for name, mode in found.items():
            assert stat.S_IMODE(mode) & ~(0o700 if stat.S_ISSOCK(mode) else 0o600) == 0, (name, oct(mode))
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        one.end()
