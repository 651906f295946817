"""CURVE on TCP: only processes that have the service's key are served."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import signal
import socket
import sys
import threading

import pytest
import zmq
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from tapes.distributed.protocol.messages import Goodbye, Read
from tapes.distributed.protocol.wire import encode
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator
from tapes.distributed.transport import curve, sockets
from tapes.distributed.transport.address import resolve
from tapes.distributed.transport.curve import HOW_TO_MAKE_ONE, VARIABLE, KeyFile
from tapes.distributed.worker.outbox import Outbox
from tapes.errors import AddressError, AggregatorUnavailable
from tapes.registry import Registry
from tests.crew import stopped
from tests.processes import connected, free_port, run_python, running, wait_for, zmq_context

FOREGROUND = """
import sys
from tapes.distributed.registry import RegistryAggregator
RegistryAggregator([], sys.argv[1]).start(fork=False)
"""
FAILED = {
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
}


def make_key(directory, name="service"):
    """Return the path of a new key file."""
    path = zmq.auth.create_certificates(directory, name)[1]
    os.chmod(path, 0o600)
    return path


def free_address(host="127.0.0.1"):
    """Return an address whose next port is free too."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return f"tcp://{host}:{port}"


@pytest.fixture
def key(short_dir, monkeypatch):
    """The service's key file, which this process uses too."""
    path = make_key(short_dir)
    monkeypatch.setenv(VARIABLE, path)
    return path


@contextlib.contextmanager
def serving(address, key, cwd):
    """An aggregator with a key, in a process of its own."""
    with running([sys.executable, "-c", FOREGROUND, address], cwd=cwd, **{VARIABLE: key}) as process:
        host, _, port = resolve(address).read.removeprefix("tcp://").rpartition(":")
        wait_for(lambda: not socket.create_connection((host, int(port)), 5).close(), "the aggregator listens")
        yield process


def handshake(monitor):
    """Return the result of a socket's first handshake."""
    while True:
        assert monitor.poll(10_000), "no handshake"
        event = recv_monitor_message(monitor)["event"]
        if event in FAILED or event == zmq.Event.HANDSHAKE_SUCCEEDED:
            return event


SERVICE = """
import os
from tapes.distributed.registry import DistributedRegistry, RegistryAggregator

address, key = os.environ["ADDRESS"], os.environ["TAPES_CURVE_KEY"]
registry = DistributedRegistry(address)
aggregator = RegistryAggregator([], address)
aggregator.start()

def work(count, leave):
    pid = os.fork()
    if pid == 0:
        registry.connect()
        for _ in range(count):
            registry.counter("c").increment()
        leave()
        os._exit(0)
    return pid

pids = [work(250, registry.close) for _ in range(4)]
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
registry.connect()
registry.counter("c").increment(7)
stats = registry.get_stats()
assert stats.c.value == 1007, stats
assert stats.tapes.workers['{state="retired"}'].value == 4, stats
os.unlink(key)  # it was read: sockets that are opened later do without
assert os.waitpid(work(30, registry.get_stats), 0)[1] == 0
assert os.waitpid(work(3, registry.close), 0)[1] == 0
assert registry.get_stats().c.value == 1040, registry.get_stats()
registry.close()
aggregator.stop()
"""


def test_processes_with_the_key_are_counted_exactly(short_dir):
    """Children forked before and after connect() count, the latter without the key file; all exit well."""
    environment = {"ADDRESS": free_address(), VARIABLE: make_key(short_dir)}
    done = run_python(SERVICE, cwd=short_dir, **environment)
    assert (done.returncode, done.stderr) == (0, "")


def messages_of(value):
    """Return the messages of a client that counted ``value``: a publication, a read and a goodbye."""
    outboxes = []
    for _ in range(3):
        outboxes.append(Outbox(Registry()))
        outboxes[-1].registry.counter("c").increment(value)
    publication, read, goodbye = (outbox.update(keyframe=True) for outbox in outboxes)
    return encode(publication), encode(Read(1, "states", read)), encode(Goodbye(2, goodbye))


def no_key(service):
    return None


def another_pair(service):
    public, secret = zmq.curve_keypair()
    return public, public, secret


def the_public_key_and_a_pair_of_its_own(service):
    return (service, *zmq.curve_keypair())


def the_public_key_alone(service):
    return service, service, zmq.curve_keypair()[1]


KEYS_OF_STRANGERS = (no_key, another_pair, the_public_key_and_a_pair_of_its_own, the_public_key_alone)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """An aggregator for strangers to attack, its key file, and its pid."""
    directory = tmp_path_factory.mktemp("service")
    address, key = free_address(), make_key(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, key)
        with serving(address, key, directory) as process:
            yield address, key, process.pid


@pytest.mark.parametrize("keys", KEYS_OF_STRANGERS)
def test_a_socket_without_the_key_neither_sends_nor_receives_a_message(service, keys, monkeypatch):
    """A stranger's handshake fails, its queued messages change nothing, and workers are still served."""
    address, key, aggregator = service
    monkeypatch.setenv(VARIABLE, key)
    with connected(address) as worker, zmq_context() as strange:
        worker.counter("c").increment(5)
        before = worker.get_stats()
        given = keys(zmq.auth.load_certificate(key)[0])
        publisher, reader = strange.socket(zmq.XPUB), strange.socket(zmq.DEALER)
        monitors = []
        publication, read, goodbye = messages_of(1000)
        ends = ((publisher, resolve(address).publish), (reader, resolve(address).read))
        with stopped(aggregator):  # after a failed handshake there is no queue, and a send would wait for one
            for connecting, endpoint in ends:
                if given:
                    connecting.curve_serverkey, connecting.curve_publickey, connecting.curve_secretkey = given
                monitors.append(connecting.get_monitor_socket())
                connecting.connect(endpoint)
            reader.send(goodbye, zmq.NOBLOCK)
            reader.send(read, zmq.NOBLOCK)
            publisher.send(publication, zmq.NOBLOCK)
        assert [handshake(monitor) in FAILED for monitor in monitors] == [True, True]
        assert not publisher.poll(0)
        assert not reader.poll(0)
        worker.counter("c").increment(2)
        stats = worker.get_stats()
        assert stats.c.value == before.c.value + 2
        assert stats.tapes.workers == before.tapes.workers
        assert "rejected" not in stats.tapes


def test_the_messages_of_a_stranger_count_with_the_right_key(service, monkeypatch):
    """The stranger's messages are accepted with the right key, so it was the key that kept them out."""
    address, key, _ = service
    monkeypatch.setenv(VARIABLE, key)
    with connected(address) as worker, zmq_context() as right:
        before = worker.get_stats().get("c", {"value": 0})["value"]
        publisher, reader = (
            make(right, resolve(address)) for make in (sockets.new_publisher, sockets.new_request_socket)
        )
        publication, read, goodbye = messages_of(1000)
        assert publisher.poll(5000)  # its subscription
        publisher.send(publication)
        reader.send(goodbye)
        reader.send(read)
        assert reader.poll(5000)
        wait_for(lambda: worker.get_stats().c.value == before + 3000, "all three are counted")


@pytest.mark.parametrize("its_key", ["", "another"])
def test_a_worker_without_the_key_is_not_served(service, its_key, short_dir, monkeypatch):
    """A worker without the key gets the error for an aggregator that does not answer; its counts are lost."""
    address, key, _ = service
    monkeypatch.setenv(VARIABLE, its_key and make_key(short_dir, its_key))
    monkeypatch.setattr("tapes.distributed.worker.connected.TIMEOUT_SECONDS", 0.3)
    with connected(address) as stranger:
        stranger.counter("stranger").increment()
        with pytest.raises(AggregatorUnavailable, match="did not answer"):
            stranger.get_stats()
    monkeypatch.setattr("tapes.distributed.worker.connected.TIMEOUT_SECONDS", 5.0)
    monkeypatch.setenv(VARIABLE, key)
    with connected(address) as worker:
        worker.counter("own").increment()
        stats = worker.get_stats()
        assert "own" in stats
        assert "stranger" not in stats


@pytest.mark.parametrize("its_key", [None, "another"])
def test_a_worker_sends_nothing_to_a_server_without_the_key(short_dir, key, its_key, monkeypatch):
    """A program that took the port gets no message; the next aggregator with the key gets every count."""
    address = free_address()
    endpoints = resolve(address)
    with zmq_context() as strange:
        public, secret = zmq.curve_keypair()
        updates, requests = strange.socket(zmq.SUB), strange.socket(zmq.ROUTER)
        updates.subscribe(b"")
        monitors = []
        for bound, endpoint in ((updates, endpoints.publish), (requests, endpoints.read)):
            if its_key:
                bound.curve_server, bound.curve_publickey, bound.curve_secretkey = True, public, secret
            monitors.append(bound.get_monitor_socket())
            bound.bind(endpoint)
        worker = DistributedRegistry(address)
        worker.connect()
        worker.counter("c").increment(5)
        with monkeypatch.context() as hurried:
            hurried.setattr("tapes.distributed.worker.connected.TIMEOUT_SECONDS", 0.3)
            with pytest.raises(AggregatorUnavailable, match="did not answer"):
                worker.get_stats()
        assert [handshake(monitor) in FAILED for monitor in monitors] == [True, True]
        assert not updates.poll(0)
        assert not requests.poll(0)
    with serving(address, key, short_dir), connected(address) as reader:
        worker.counter("c").increment(2)
        worker.close()
        assert reader.get_stats().c.value == 7


def test_workers_come_back_to_a_new_aggregator(short_dir, key):
    """After the aggregator was killed, workers send their whole state to the next one."""
    address = free_address()
    worker = DistributedRegistry(address)
    with serving(address, key, short_dir) as process:
        worker.connect()
        worker.counter("c").increment(5)
        assert worker.get_stats().c.value == 5
        process.send_signal(signal.SIGKILL)
        process.wait(5)
    worker.counter("c").increment(2)
    with serving(address, key, short_dir), connected(address) as reader:
        wait_for(lambda: reader.get_stats().get("c", {}).get("value") == 7, "the keyframe arrives")
        worker.close()


def test_an_aggregator_with_a_key_exits_cleanly(short_dir, key):
    """It exits normally while strangers are connected that send nothing, send garbage, or are refused."""
    address = free_address()
    with (
        serving(address, key, short_dir) as process,
        zmq_context() as strange,
        contextlib.ExitStack() as stack,
    ):
        port = int(address.rpartition(":")[2])
        for where in (port, port + 1):
            stack.enter_context(socket.create_connection(("127.0.0.1", where)))
            stack.enter_context(socket.create_connection(("127.0.0.1", where))).send(
                b"GET / HTTP/1.0\r\n\r\n" * 9
            )
        refused = strange.socket(zmq.DEALER)
        refused.curve_serverkey = zmq.auth.load_certificate(key)[0]
        refused.curve_publickey, refused.curve_secretkey = zmq.curve_keypair()
        monitor = refused.get_monitor_socket()
        refused.connect(resolve(address).read)
        assert handshake(monitor) == zmq.Event.HANDSHAKE_FAILED_AUTH
        with connected(address) as worker:
            worker.counter("c").increment(5)
            assert worker.get_stats().c.value == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(4) == 0
    log = (short_dir / "output.log").read_text()
    assert "refused a client at 127.0.0.1" in log
    assert len(log.splitlines()) == 1


def test_joining_starts_an_aggregator_that_has_the_key(home):
    """An aggregator that a worker starts inherits the key, and workers accept no other aggregator."""
    program = """
import os, sys, tapes
address = sys.argv[1]
tapes.join(address)
pids = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        tapes.counter("c").increment(10)
        sys.exit(0)
    pids.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 3
tapes.counter("c").increment(3)
print(tapes.get_stats().c.value)
"""
    key = make_key(home.private.parent)
    command = [sys.executable, "-c", program, free_address()]
    assert home.run(command, **{VARIABLE: key})[:2] == (0, "33\n")


def test_beyond_loopback(short_dir, key):
    """Workers connect to this machine's own address, where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no route to other machines")
        host = probe.getsockname()[0]
    if host.startswith(("127.", "0.")):
        pytest.skip("this machine has no address beyond loopback")
    address = free_address(host)
    with serving(address, key, short_dir), connected(address) as worker, connected(address) as reader:
        worker.counter("c").increment(5)
        worker.close()
        assert reader.get_stats().c.value == 5


def write(path, public, secret=b"", mode=0o600):
    path.write_text(f'curve\n    public-key = "{public.decode()}"\n    secret-key = "{secret.decode()}"\n')
    path.chmod(mode)


def by_mode(mode):
    return lambda path: write(path, *zmq.curve_keypair(), mode=mode)


UNUSABLE = {
    "missing": (lambda path: None, "No such file"),
    "a directory": (lambda path: path.mkdir(), "is not a regular file"),
    "a pipe": (lambda path: os.mkfifo(path, 0o600), "is not a regular file"),
    "empty": (lambda path: path.touch(0o600), "has no key pair"),
    "garbage": (lambda path: path.write_bytes(b"public-key\n\xff"), "has no key pair"),
    "public": (lambda path: path.write_text('public-key = "%s"' % ("x" * 40)), "public half"),
    "mixed": (lambda path: write(path, zmq.curve_keypair()[0], zmq.curve_keypair()[1]), "two halves"),
    "short": (lambda path: write(path, zmq.curve_keypair()[0], b"short"), "two halves"),
    "no Z85": (lambda path: write(path, zmq.curve_keypair()[0], b'~' * 40), "two halves"),
    "of the group": (by_mode(0o640), "got '0o640', expected 0o600"),
    "of all": (by_mode(0o604), "got '0o604', expected 0o600"),
    "written by others": (by_mode(0o620), "got '0o620', expected 0o600"),
}  # fmt: skip


def assert_refused(match, forks=(False,)):
    """Assert that connect() and start() fail with an error that matches, and leave no socket open."""
    address = "tcp://127.0.0.1:5555"
    registry = DistributedRegistry(address)
    with pytest.raises(AddressError, match=match):
        registry.connect()
    assert not registry.session.is_connected
    gc.collect()  # a context that is left would warn
    for fork in forks:
        with pytest.raises(AddressError, match=match):
            RegistryAggregator([], address).start(fork=fork)


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_key_file_that_cannot_be_used_is_an_error(short_dir, monkeypatch, case):
    """connect() and start() raise one sentence about the key file."""
    make, match = UNUSABLE[case]
    make(short_dir / "key")
    monkeypatch.setenv(VARIABLE, str(short_dir / "key"))
    assert_refused(match)


def test_an_unreadable_key_file_is_an_error(key, monkeypatch):
    """A key file without permission to read is an AddressError, not a PermissionError."""

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(curve, "load_certificate", refuse)
    assert_refused(r"can't be read \(Permission denied\)")


def test_a_relative_key_file_is_an_error(key, monkeypatch):
    """A relative path is refused: the aggregator has another working directory."""
    monkeypatch.setenv(VARIABLE, os.path.relpath(key))
    assert_refused("absolute path", forks=(False, True))


def test_a_libzmq_without_curve_is_an_error(key, monkeypatch):
    """The error for a libzmq without CURVE says how to install one that has it."""
    monkeypatch.setattr(zmq, "has", lambda feature: feature != "curve")
    assert_refused(r"does not support CURVE.*install pyzmq")


def test_the_command_in_errors_makes_a_key_file(short_dir):
    """The command that errors suggest makes a usable key file, under any umask."""
    _, program, argument = shlex.split(HOW_TO_MAKE_ONE.partition(": ")[2].partition(" and set ")[0])
    assert program == "-c"
    done = run_python(argument, cwd=short_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(KeyFile(str(short_dir / "tapes.key_secret")).pair.secret) == 40


def test_a_secret_key_is_in_no_text(key):
    """No repr that an error or the log could contain has the secret key."""
    file = KeyFile(key)
    assert file == KeyFile(key) != KeyFile(key + "2")
    assert file.pair.secret.decode() not in f"{file!r}{file.pair!r}{resolve('tcp://127.0.0.1:5555')!r}"


def checkers():
    return [thread for thread in threading.enumerate() if thread.name == "tapes-curve"]


def test_the_zap_handler_ends_with_its_context(key):
    """The thread that checks keys ends when its context is destroyed."""
    with zmq_context() as made:
        bound = sockets.bind(made, resolve(free_address()))
        assert len(checkers()) == len(bound) - 1 == 1
    wait_for(lambda: not checkers(), "the thread ends")


def test_without_a_zap_handler_no_client_is_accepted(key, monkeypatch):
    """If the handler does not run, 0MQ refuses every client; it does not accept every client."""
    monkeypatch.setattr(curve, "start_zap_handler", lambda context, pair: None)
    endpoints = resolve(free_address())
    with zmq_context() as ours, zmq_context() as theirs:
        bound = sockets.bind(ours, endpoints)
        worker = theirs.socket(zmq.DEALER)
        curve.as_client(worker, endpoints.key.pair)
        monitor = worker.get_monitor_socket()
        worker.connect(endpoints.read)
        assert handshake(monitor) in FAILED
        assert not any(one.closed for one in bound)


def test_without_a_thread_for_the_zap_handler_bind_fails(key, monkeypatch):
    """bind() raises if the handler's thread can't start, and the context still ends."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("tapes.threads.NativeThread.start", refuse)
    with zmq_context() as made, pytest.raises(AggregatorUnavailable, match="thread"):
        sockets.bind(made, resolve(free_address()))
