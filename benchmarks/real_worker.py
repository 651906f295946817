"""A worker of `make scale`: a connected registry that touches all its series between publications.

    python real_worker.py ADDRESS COUNTERS HISTOGRAMS TIMERS BINS LABELS

Says when it has begun, and ends with its standard input.
"""

import itertools
import select
import sys

from load import Shape, distribution, series_of

from tapes import DistributedRegistry

PAUSE_SECONDS = 0.04


def main(address: str, *numbers: str) -> None:
    shape = Shape(*map(int, numbers))
    registry = DistributedRegistry(address)
    touches = []
    for kind, count in zip(("counter", "histogram", "timer"), shape):
        for number in range(count):
            metric = series_of(registry, kind, number, shape.labels)
            if kind == "counter":
                touches.append((metric.increment, itertools.repeat(1)))
                continue
            values = distribution(shape.bins, number)
            for value in values:
                metric.update(value)
            touches.append((metric.update, itertools.cycle(values)))
    registry.connect()
    print(flush=True)
    while not select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
        for record, values in touches:
            record(next(values))
    registry.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
