"""CURVE for TCP: only processes that have the service's key pair can connect.

All processes of a service have one key pair, in the file that ``TAPES_CURVE_KEY`` names. It is both the
aggregator's server key and the workers' client key: workers trust each other, and one file is easy to
distribute. So a worker connects only to an aggregator that has the secret half, and the aggregator accepts
only such workers.

To check a client, 0MQ sends a request to a handler (ZAP, RFC 27). Ours takes a few lines. pyzmq's
``ThreadAuthenticator`` runs an event loop, is a greenlet under gevent, and must be stopped before its context
is destroyed, because that closes its sockets while it uses them. Ours is a native thread that waits in a
receive, on a socket that the context does not know. The end of the context interrupts the receive and waits
until the thread has closed its socket, so no code has to stop the thread. Where the handler does not run (in
a forked child, or after an error), 0MQ accepts no client; without ZAP_ENFORCE_DOMAIN it would accept every
client.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import zmq
from zmq.auth import load_certificate
from zmq.utils import z85

from tapes import threads
from tapes.errors import AddressError, AggregatorUnavailable
from tapes.once import OnceLogger

VARIABLE = "TAPES_CURVE_KEY"
HOW_TO_MAKE_ONE = (
    'make one with: python -c "import os, zmq.auth; os.umask(0o077); '
    "zmq.auth.create_certificates('.', 'tapes')\" "
    f"and set {VARIABLE} to the absolute path of tapes.key_secret"
)
_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"tapes"

_log = logging.getLogger("tapes.distributed")


class Pair(NamedTuple):
    """A CURVE key pair, both halves in Z85."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        """Return the public half only: the secret must not be logged."""
        return f"<the key pair of {self.public.decode('ascii', 'replace')}>"


@dataclass(frozen=True)
class KeyFile:
    """The file of the service's key pair, as ``zmq.auth.create_certificates`` writes it.

    It is read once, when first needed. Sockets that are opened later, even in forked children, do not need
    the file: it may be removed by then, or not readable any more.
    """

    path: str

    @classmethod
    def from_environment(cls) -> KeyFile | None:
        path = os.environ.get(VARIABLE)
        return cls(path) if path else None

    @cached_property
    def pair(self) -> Pair:
        """The key pair; raises AddressError if the file can't be used, or other users may read it."""
        if not zmq.has("curve"):
            raise AddressError(
                f"the installed libzmq ({zmq.zmq_version()}) does not support CURVE",
                remedy=f"install pyzmq as a wheel, or build libzmq with libsodium; or unset {VARIABLE}",
            )
        if not os.path.isabs(self.path):
            raise AddressError(
                VARIABLE, got=self.path, expected="an absolute path",
                remedy="set it to one; the aggregator's working directory is /",
            )  # fmt: skip
        mode, public, secret = self._load()
        if secret is None:
            raise self._unusable("has only the public half of a key pair")
        if not _belong_together(public, secret):
            raise self._unusable("has two halves that do not belong together")
        if mode & 0o077:
            raise AddressError(
                f"users other than its owner may use the key file {self.path}",
                got=oct(stat.S_IMODE(mode)), expected="0o600 or 0o400",
                remedy=f"run: chmod 600 {self.path}; if another user could read it, make a new one",
            )  # fmt: skip
        return Pair(public, secret)

    def _load(self) -> tuple[int, bytes, bytes | None]:
        try:
            mode = os.stat(self.path).st_mode
            if stat.S_ISREG(mode):  # opening a pipe can block
                return (mode, *load_certificate(self.path))
        except OSError as error:
            raise self._unusable(f"can't be read ({error.strerror or error})") from None
        except (ValueError, IndexError):
            raise self._unusable("has no key pair") from None
        raise self._unusable("is not a regular file")

    def _unusable(self, why: str) -> AddressError:
        return AddressError(
            f"the key file {why}", got=self.path, expected="a *.key_secret file written by pyzmq",
            remedy=HOW_TO_MAKE_ONE,
        )  # fmt: skip


def _belong_together(public: bytes, secret: bytes) -> bool:
    try:
        return zmq.curve_public(secret) == public
    except (ValueError, zmq.ZMQError):  # a wrong length, or not Z85
        return False


def as_client(socket: zmq.Socket[bytes], pair: Pair) -> None:
    """Have ``socket`` use ``pair`` as its key, and connect only to a server that has it."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, pair.public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)


def as_server(socket: zmq.Socket[bytes], pair: Pair) -> None:
    """Have ``socket`` accept only the clients that the handler of `start_zap_handler` accepts."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def start_zap_handler(context: zmq.Context[Any], pair: Pair) -> None:
    """Have the servers of ``context`` accept only clients that have ``pair``, until the context ends.

    Raises AggregatorUnavailable if its thread can't be started.
    """
    # A shadow's socket: context.destroy() does not close it while the thread uses it.
    handler: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.REP)
    try:
        handler.setsockopt(zmq.LINGER, 0)
        handler.bind(_ZAP)
        threads.NativeThread(lambda: _handle_zap(handler, pair), "tapes-curve").start()
    except BaseException as error:
        handler.close()  # else the end of the context would wait for it
        if not isinstance(error, RuntimeError):
            raise
        what = "the aggregator can't start the thread that checks its clients' keys"
        raise AggregatorUnavailable(what) from None


def _handle_zap(handler: zmq.Socket[bytes], pair: Pair) -> None:
    expected = [b"CURVE", z85.decode(pair.public)]
    once = OnceLogger(_log)
    try:
        while True:
            request = handler.recv_multipart()
            is_accepted = request[5:] == expected  # CURVE makes clients prove that they have the secret half
            if not is_accepted:
                client = b"".join(request[3:4]).decode("ascii", "replace")
                message = "tapes refused a client at %s that has another key; this is logged only once"
                once.warning("key", message, client)
            result = [b"200", b"OK", b"", b""] if is_accepted else [b"400", b"another key", b"", b""]
            handler.send_multipart([b"1.0", b"".join(request[1:2]), *result])
    except zmq.ZMQError:  # the context has ended
        pass
    finally:
        handler.close()
