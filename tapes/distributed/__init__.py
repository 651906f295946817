"""One answer for many processes: workers publish their state, an aggregator adds it up.

    worker:  DistributedRegistry ── XPUB connect ──►  SUB bind     :aggregator: ledger, rendering, reporters
             reads, goodbye      ── DEALER       ──►  ROUTER bind

Messages carry cumulative state, so a lost, repeated or reordered one does no harm.
"""

from tapes.errors import MissingExtra

try:
    import msgpack as _msgpack  # noqa: F401
    import zmq as _zmq  # noqa: F401
except ModuleNotFoundError:
    raise MissingExtra("the distributed registry", "distributed") from None
