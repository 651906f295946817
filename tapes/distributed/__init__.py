"""One answer for many processes: workers publish their state, an aggregator adds it up.

    worker:  DistributedRegistry ── XPUB connect ──►  SUB bind     :aggregator: ledger, rendering, reporters
             reads, goodbye      ── DEALER       ──►  ROUTER bind

Messages carry cumulative state, so a lost, repeated or reordered one does no harm.
"""

from tapes.errors import AggregatorUnavailable, MissingExtra

try:
    import fcntl as _fcntl  # noqa: F401
except ModuleNotFoundError:
    raise AggregatorUnavailable(
        "tapes connects processes on Unix only", remedy="on Windows every process answers for itself"
    ) from None
try:
    import msgpack as _msgpack  # noqa: F401
    import zmq as _zmq  # noqa: F401
except ModuleNotFoundError:
    raise MissingExtra("the distributed registry", "distributed") from None
