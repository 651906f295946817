"""A StatsD receiver for tests that look at every packet."""

from __future__ import annotations

import contextlib
import socket

from tests.processes import free_port


class Receiver:
    """A UDP socket that keeps all packets. It can be closed and opened again at the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.packets: list[bytes] = []
        self.open()

    def open(self) -> None:
        """Open the socket at the port."""
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", self.port))
        self.socket.setblocking(False)

    def close(self) -> None:
        """Take the remaining packets and close the socket."""
        self.take()
        self.socket.close()

    def take(self) -> list[bytes]:
        """Return the packets since the last call. On loopback a packet has arrived when its send returns."""
        new = []
        with contextlib.suppress(BlockingIOError):
            while True:
                new.append(self.socket.recv(1 << 16))
        self.packets += new
        return new

    def lines(self) -> list[str]:
        """Return the lines of the packets since the last call."""
        return [line for packet in self.take() for line in packet.decode().split("\n")]

    def counts(self) -> dict[str, float]:
        """Return the sum of each counter over all packets."""
        self.take()
        sums: dict[str, float] = {}
        for line in b"\n".join(self.packets).decode().split("\n"):
            name, _, rest = line.partition(":")
            value, _, kind = rest.partition("|")
            if kind.startswith("c"):
                sums[name] = sums.get(name, 0) + float(value)
        return sums
