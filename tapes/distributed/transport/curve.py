"""CURVE for TCP: who holds the service's key pair may talk, and nobody else.

All processes of a service have one pair, in the file that ``TAPES_CURVE_KEY`` names. It is the aggregator's
server key and the workers' client key at once: workers trust each other anyway, and one file is easily
handed out. Thus a worker talks to nobody who doesn't hold the secret half, and neither does the aggregator.

For the latter 0MQ asks a handler (ZAP, RFC 27) whether it may admit a client. Ours is a few lines and not
pyzmq's ``ThreadAuthenticator``: that runs an event loop, is a greenlet under gevent, and must be stopped
before its context is destroyed, which would close its sockets under its hands. Ours is a thread of the
operating system with a socket that the context doesn't know, waiting in a receive; the end of the context
interrupts that and waits until the thread has closed its socket. So nobody needs to stop it. Where it is
not, in a forked child or should it fail, 0MQ admits nobody (ZAP_ENFORCE_DOMAIN; without that, everybody).
"""

from __future__ import annotations

import logging
import os
import stat
from typing import Any, NamedTuple

import zmq
from zmq.auth import load_certificate
from zmq.utils import z85

from tapes import threads
from tapes.errors import AddressError, AggregatorUnavailable

__all__ = ["HOW_TO_MAKE_ONE", "VARIABLE", "KeyFile", "Pair", "as_client", "as_server", "start_zap_handler"]

VARIABLE = "TAPES_CURVE_KEY"
HOW_TO_MAKE_ONE = (
    'make one by: python -c "import os, zmq.auth; os.umask(0o077); '
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
        """Return nothing that must not be in a log."""
        return f"<the key pair of {self.public.decode('ascii', 'replace')}>"


class KeyFile:
    """The file of the service's key pair, as ``zmq.auth.create_certificates`` writes it.

    It is read once, when it is first needed: sockets that are opened later, in forked children too, don't
    depend on a file that may be gone then, or that they no longer may read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._pair: Pair | None = None

    @classmethod
    def from_environment(cls) -> KeyFile | None:
        """Return the one that ``TAPES_CURVE_KEY`` names, if it is set."""
        path = os.environ.get(VARIABLE)
        return cls(path) if path else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyFile) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"KeyFile({self.path!r})"

    def pair(self) -> Pair:
        """Return the key pair.

        Raises:
            AddressError: If the file can't be used, or may be read by others than its owner.
        """
        if self._pair is None:
            self._pair = self._read()
        return self._pair

    def _read(self) -> Pair:
        if not zmq.has("curve"):
            raise AddressError(
                f"the libzmq that is installed ({zmq.zmq_version()}) has no CURVE",
                remedy=f"install pyzmq as a wheel, or build libzmq with libsodium; or unset {VARIABLE}",
            )
        if not os.path.isabs(self.path):
            raise AddressError(
                VARIABLE, got=self.path, expected="an absolute path", remedy="an aggregator works in /"
            )
        mode, public, secret = self._opened()
        if secret is None:
            raise self._unusable("holds the public half of a key pair only")
        if not _belong_together(public, secret):
            raise self._unusable("holds two halves that are no key pair")
        if mode & 0o077:
            raise AddressError(
                f"others than its owner may use the key file {self.path}",
                got=oct(stat.S_IMODE(mode)),
                expected="0o600 or 0o400",
                remedy=f"run: chmod 600 {self.path}; if others could read it, make a new one",
            )
        return Pair(public, secret)

    def _opened(self) -> tuple[int, bytes, bytes | None]:
        try:
            mode = os.stat(self.path).st_mode
            if stat.S_ISREG(mode):  # to open a pipe might take for ever
                return (mode, *load_certificate(self.path))
        except OSError as error:
            raise self._unusable(f"can't be read ({error.strerror or error})") from None
        except (ValueError, IndexError):
            raise self._unusable("holds no key pair") from None
        raise self._unusable("is no file")

    def _unusable(self, why: str) -> AddressError:
        return AddressError(
            f"the key file {why}",
            got=self.path,
            expected="a *.key_secret file as pyzmq writes it",
            remedy=HOW_TO_MAKE_ONE,
        )


def _belong_together(public: bytes, secret: bytes) -> bool:
    try:
        return zmq.curve_public(secret) == public
    except (ValueError, zmq.ZMQError):  # of another length, or no Z85
        return False


def as_client(socket: zmq.Socket[bytes], pair: Pair) -> None:
    """Have ``socket`` connect to nobody but a holder of ``pair``, and as one."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, pair.public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)


def as_server(socket: zmq.Socket[bytes], pair: Pair) -> None:
    """Have ``socket`` admit only those whom `start_zap_handler` lets pass."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def start_zap_handler(context: zmq.Context[Any], pair: Pair) -> None:
    """Have the servers of ``context`` admit the holders of ``pair``, and nobody else, until it ends.

    Raises:
        AggregatorUnavailable: If no thread can be started for it.
    """
    # Of a shadow, so that context.destroy() leaves it to the thread that uses it.
    handler: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.REP)
    try:
        handler.setsockopt(zmq.LINGER, 0)
        handler.bind(_ZAP)
        threads.NativeThread(lambda: _handle_zap(handler, pair), "tapes-curve").start()
    except BaseException as error:
        handler.close()  # or the context would wait for it for ever
        if not isinstance(error, RuntimeError):
            raise
        raise AggregatorUnavailable("the aggregator can't start the thread that checks its clients") from None


def _handle_zap(handler: zmq.Socket[bytes], pair: Pair) -> None:
    holder = [b"CURVE", z85.decode(pair.public)]
    warned = False
    try:
        while True:
            request = handler.recv_multipart()
            admitted = request[5:] == holder  # CURVE has them prove that the secret half is theirs too
            if not admitted and not warned:
                warned = True
                who = b"".join(request[3:4]).decode("ascii", "replace")
                _log.warning(
                    "tapes refused a client at %s that holds another key; this is logged only once", who
                )
            verdict = [b"200", b"OK", b"", b""] if admitted else [b"400", b"another key", b"", b""]
            handler.send_multipart([b"1.0", b"".join(request[1:2]), *verdict])
    except zmq.ZMQError:  # the context ends
        pass
    finally:
        handler.close()
