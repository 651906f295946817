"""What the environment says about tapes; asked for before anything that has to be installed is imported."""

from __future__ import annotations

import multiprocessing
import os

from tapes import service
from tapes.errors import InvalidArgument
from tapes.forks import connected_parent

__all__ = [
    "LABELS", "address_told", "is_disabled", "is_spawned", "labels_given", "may_start", "service_address",
]  # fmt: skip

LABELS = "TAPES_LABELS"


def is_disabled() -> bool:
    """Return whether tapes is turned off (``TAPES_DISABLED=1``): nothing is started or connected."""
    return os.environ.get("TAPES_DISABLED", "0") not in ("", "0")


def may_start() -> bool:
    """Return whether aggregators may be started by themselves (unless ``TAPES_AUTOSTART=0``)."""
    return os.environ.get("TAPES_AUTOSTART", "1") != "0"


def labels_given() -> dict[str, str]:
    """Return the labels that the default registry gives to every series: ``TAPES_LABELS=key=value,…``.

    Raises:
        InvalidArgument: If it can't be read so.
    """
    text = os.environ.get(LABELS, "")
    labels: dict[str, str] = {}
    for pair in text.split(",") if text else ():
        name, _, value = map(str.strip, pair.partition("="))
        if not (name and value) or name in labels:
            raise InvalidArgument(
                LABELS,
                got=text,
                expected="KEY=VALUE,KEY=VALUE, each key once, such as region=eu,service=shop",
            )
        labels[name] = value
    return labels


def address_told() -> str:
    """Return where the default registry is to connect by itself; empty if nowhere.

    ``TAPES_ADDR``, or where the process that started this one has its own connected.
    """
    if is_disabled():
        return ""
    return os.environ.get("TAPES_ADDR") or next(iter(connected_parent()), "")


def service_address() -> str:
    """Return the same, or where the service is that this process belongs to, if it has an aggregator."""
    return "" if is_disabled() else address_told() or service.address()


def is_spawned() -> bool:
    """Return whether multiprocessing made this process, or is about to make it one of its own."""
    process = multiprocessing.current_process()
    return multiprocessing.parent_process() is not None or getattr(process, "_inheriting", False)
