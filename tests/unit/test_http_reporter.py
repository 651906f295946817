"""HTTPReporter: metrics over HTTP, for applications that have no HTTP server of their own."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading

import pytest

import tapes
from tapes.errors import AddressInUse, InvalidArgument
from tapes.reporting import http
from tapes.reporting.http import HTTPReporter
from tests.processes import get, wait_for


@pytest.fixture
def reporter():
    registry = tapes.Registry()
    registry.counter("c").increment(3)
    with HTTPReporter(0, registry) as reporter:
        yield reporter


@pytest.mark.parametrize("path", ["/", "/metrics", "/metrics/", "/metrics?format=json"])
def test_it_answers_as_the_adapters_do(reporter, path):
    """HTTPReporter answers on loopback, with JSON unless the client requests another format."""
    status, headers, body = get(reporter.port, path)
    assert (status, headers["Content-Type"], json.loads(body)) == (
        200,
        "application/json",
        {"c": {"value": 3}},
    )
    assert (headers["Vary"], headers["Cache-Control"]) == ("Accept", "no-store")
    assert b"c_total 3" in get(reporter.port, path.partition("?")[0], Accept="text/plain")[2]
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", reporter.port))


def answered(port, *lines):
    """The status line and the content type of the answer to a request with these header lines."""
    head = b"\r\n".join([b"GET / HTTP/1.1", b"Connection: close", *lines, b"", b""])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head)
        status, *rest = client.makefile("rb").read().split(b"\r\n")
    kinds = [line for line in rest if line.startswith(b"Content-Type:")]
    return status, kinds[0].partition(b";")[0]


@pytest.mark.parametrize("kinds", [(b"image/png", b"text/plain"), (b"text/plain", b"image/png")])
def test_several_accept_lines_are_one_list(reporter, kinds):
    """Several Accept headers are one list, whatever their order."""
    status, kind = answered(reporter.port, *(b"Accept: " + kind for kind in kinds))
    assert (status, kind) == (b"HTTP/1.1 200 OK", b"Content-Type: text/plain")


def test_a_head_of_more_than_64_kb_is_refused(reporter):
    """A request head of more than 64 KB is refused, and the next request is answered."""
    lines = [b"Accept: " + b"," * 990] * 66
    assert answered(reporter.port, *lines[:65])[0] == b"HTTP/1.1 200 OK"
    assert answered(reporter.port, *lines)[0].startswith(b"HTTP/1.1 431 ")
    assert get(reporter.port, "/")[0] == 200


def test_head_is_get_without_its_body(reporter):
    """The answer to HEAD has the headers of GET and no body."""
    (status, headers, body), (_, expected, _) = (
        get(reporter.port, "/", method) for method in ("HEAD", "GET")
    )
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == expected["Content-Length"]


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/nothing", 404, "/metrics"),
        ("GET", "/?format=xml", 400, "openmetrics"),
        ("POST", "/", 405, "can only be read"),
        ("DELETE", "/metrics", 405, "can only be read"),
        ("OPTIONS", "/", 405, "can only be read"),
    ],
)
def test_refusals_are_plain_sentences(reporter, method, path, status, says):
    """A wrong path, method or format is refused by a sentence that says what to do."""
    answered, headers, body = get(reporter.port, path, method)
    assert (answered, headers["Content-Type"]) == (status, "text/plain; charset=utf-8")
    assert says in body.decode()


def test_a_client_that_sends_nothing_delays_no_other_client(reporter):
    """A client that connects and sends nothing does not delay other clients."""
    with socket.create_connection(("127.0.0.1", reporter.port)):
        assert get(reporter.port, "/")[0] == 200


def test_start_twice_and_a_port_that_is_taken_are_errors(reporter):
    """A second start() and a port in use raise errors; stop() frees the port and can be called twice."""
    with pytest.raises(InvalidArgument, match="called before"):
        reporter.start()
    another = HTTPReporter(reporter.port)
    with pytest.raises(AddressInUse, match=str(reporter.port)):
        another.start()
    another.stop()
    reporter.stop()
    reporter.stop()
    with another:
        assert get(another.port, "/")[0] == 200
    with reporter:
        assert get(reporter.port, "/")[0] == 200


@pytest.mark.parametrize("port", [-1, 65536, "8889", None, 1.5])
def test_a_port_is_checked(port):
    """HTTPReporter refuses an invalid port when it is made."""
    with pytest.raises(InvalidArgument, match="a TCP port"):
        HTTPReporter(port)


def test_a_forked_child_closes_the_listening_socket(reporter):
    """A forked child closes its parent's listening socket and can listen on another port."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(sender)
        reporter.port = 0
        with reporter:
            served = get(reporter.port, "/")[0] == 200
            os.read(receiver, 1)
        os._exit(0 if served else 1)
    assert get(reporter.port, "/")[0] == 200
    reporter.stop()

    def is_free():
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", reporter.port)) == errno.ECONNREFUSED

    wait_for(is_free, "the child has let go")
    os.close(sender)
    os.close(receiver)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    "request_", [b"GET http://[ HTTP/1.1", b"\x16\x03\x01garbage", b"GET / HTTP/9.9", b"FOO / HTTP/1.1"]
)
def test_garbage_is_answered_or_cut_off(reporter, request_, capfd):
    """Garbage is answered or its connection closed, prints nothing, and others are answered."""
    with socket.create_connection(("127.0.0.1", reporter.port), timeout=5) as client:
        client.sendall(request_ + b"\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
        while client.recv(4096):  # the end of the connection, as what was sent is not read
            pass
    with socket.create_connection(("127.0.0.1", reporter.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset at its end
    assert get(reporter.port, "/")[0] == 200
    reporter.stop()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("host", ["", None, 5, "http://localhost"])
def test_a_host_is_checked(host):
    """HTTPReporter refuses an invalid host; an empty one would mean all addresses."""
    with pytest.raises(InvalidArgument, match="a host"):
        HTTPReporter(0, host=host)


def test_no_thread_is_left_after_stop(reporter):
    """After stop() no thread of the reporter is left."""
    get(reporter.port, "/")
    reporter.stop()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "tapes-http"], "its end")


def connected(reporter):
    return socket.create_connection(("127.0.0.1", reporter.port), timeout=20)


def answer_of(client):
    """Return the status and the body of the answer, read to the end of the connection."""
    with client.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_a_client_that_sends_single_bytes_is_disconnected_in_time(reporter, monkeypatch):
    """A client that sends a byte now and then is disconnected when its time is over."""
    monkeypatch.setattr(http, "_CLIENT_TIMEOUT_SECONDS", 0.5)
    with connected(reporter) as client:
        ended = threading.Event()

        def trickle():
            for byte in b"GET /metrics HTTP/1.1\r\nX-Slow: " + b"x" * 10_000:
                if ended.wait(0.05):
                    return
                try:
                    client.send(bytes([byte]))
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert client.recv(1000) == b""  # the server has closed; a timeout would raise
        except ConnectionResetError:
            pass
        finally:
            ended.set()
            thread.join()
    wait_for(lambda: not reporter._server._clients, "its thread has ended")


def test_clients_that_send_nothing_delay_readers_for_seconds_only(reporter, monkeypatch):
    """If clients that send nothing have all threads, a reader gets a 503, and a later one its answer."""
    monkeypatch.setattr(http, "_MAX_CLIENTS", 8)
    silent = [connected(reporter) for _ in range(8)]
    try:
        wait_for(lambda: len(reporter._server._clients) == 8, "they have all the threads")
        with connected(reporter) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer_of(client) == (503, b"There are too many readers. Ask again in a second.\n")
        wait_for(lambda: get(reporter.port, "/metrics")[0] == 200, "a reader is answered", 5)
    finally:
        for client in silent:
            client.close()


def test_a_burst_of_readers_takes_a_bounded_number_of_threads_and_each_has_an_answer(reporter):
    """A burst of readers uses a bounded number of threads, and each reader gets an answer."""
    before = threading.active_count()
    most, statuses = 0, []
    clients = [connected(reporter) for _ in range(300)]
    for client in clients:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        most = max(most, threading.active_count() - before)
    for client in clients:
        with client:
            statuses.append(answer_of(client)[0])
    assert set(statuses) <= {200, 503}
    assert 200 in statuses
    assert most <= http._MAX_CLIENTS
    wait_for(lambda: not reporter._server._clients and not reporter._server._refused, "nothing stays open")


def test_a_client_that_no_thread_can_be_started_for_gets_a_503(reporter, monkeypatch):
    """If no thread can be started for a client, it gets a 503."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with connected(reporter) as client, monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with connected(reporter) as other:
            other.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert answer_of(other)[0] == 503
    assert client.fileno() == -1


def test_a_refused_client_that_never_stops_sending_delays_no_other():
    """A refused client that sends without a pause does not delay other clients."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(b"x" * 100_000)
        assert not http._has_closed(ours)  # one piece is read
        assert len(ours.recv(1 << 20)) > 0
        theirs.close()
        assert http._has_closed(ours)
