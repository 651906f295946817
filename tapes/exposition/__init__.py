"""How a snapshot is written: its forms, and which of them a client gets.

Forms: ``json`` is the tree of ``get_stats()``; ``prometheus`` is the text format 0.0.4; ``openmetrics`` is
OpenMetrics 1.0.0.
"""

from __future__ import annotations

import json
from typing import Callable, NamedTuple

from tapes.errors import InvalidArgument
from tapes.exposition import prometheus
from tapes.registry import Registry
from tapes.snapshot import Snapshot

__all__ = ["FORMS", "Form", "negotiate", "render", "write"]


class Form(NamedTuple):
    """One way to write a snapshot.

    Attributes:
        content_type: What HTTP says of it.
        media_types: What a client names to ask for it.
        write: Writes a snapshot.
    """

    content_type: str
    media_types: tuple[str, ...]
    write: Callable[[Snapshot], bytes]


def _write_json(snapshot: Snapshot) -> bytes:
    return json.dumps(snapshot.stats(), allow_nan=False).encode() + b"\n"


FORMS = {
    "json": Form("application/json", ("application/json", "application/*", "*/*"), _write_json),
    "prometheus": Form(
        "text/plain; version=0.0.4; charset=utf-8", ("text/plain", "text/*"), prometheus.write
    ),
    "openmetrics": Form(
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ("application/openmetrics-text",),
        lambda snapshot: prometheus.write(snapshot, openmetrics=True),
    ),
}


def render(registry: Registry, form: str) -> bytes:
    """Write all values of ``registry``, for the whole service if it is connected.

    Raises:
        AggregatorUnavailable: If the registry is connected and the aggregator doesn't answer.
    """
    if registry.connection is not None:
        return registry.connection.render(form)
    return write(registry.snapshot(), form)


def write(snapshot: Snapshot, form: str) -> bytes:
    """Write ``snapshot`` in the form of that name."""
    return FORMS[form].write(snapshot)


def negotiate(accept: str = "", wanted: str = "") -> str:
    """Return the name of the form that a client gets.

    Args:
        accept: The request's ``Accept`` header. The form of the highest quality wins, and of several the
            one that the header names first; JSON for ``*/*``, no header, or nothing that we write.
        wanted: What ``?format=`` says; wins over ``accept``.

    Raises:
        InvalidArgument: If ``wanted`` is no form.
    """
    if wanted:
        if wanted in FORMS:
            return wanted
        raise InvalidArgument("the format", got=wanted, expected=" or ".join(FORMS))
    best, best_quality = "json", 0.0
    for part in accept.lower().split(","):
        media_type, *parameters = (piece.strip() for piece in part.split(";"))
        quality = _quality(parameters)
        for name, form in FORMS.items():
            if media_type in form.media_types and quality > best_quality:
                best, best_quality = name, quality
    return best


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
