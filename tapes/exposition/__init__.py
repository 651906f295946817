"""Writing a snapshot: the formats, and which of them a client gets.

``json`` is the tree of ``get_stats()``; ``prometheus`` is the text format 0.0.4; ``openmetrics`` is
OpenMetrics 1.0.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from tapes.errors import InvalidArgument
from tapes.exposition import prometheus
from tapes.registry import Registry
from tapes.snapshot import Snapshot

MAX_CHARACTERS = 2048
"""Maximum length of a header or a query string that is read. Scrapers and browsers send less than 500."""

_MAX_RANGES = 32  # maximum number of media ranges of an ``Accept`` header that are read


class Form(NamedTuple):
    """One format of a snapshot: its media type, and the function that writes it."""

    content_type: str
    write: Callable[[Snapshot], bytes]


def _write_json(snapshot: Snapshot) -> bytes:
    return json.dumps(snapshot.tree(), allow_nan=False).encode() + b"\n"


FORMS = {
    "json": Form("application/json", _write_json),
    "prometheus": Form("text/plain; version=0.0.4; charset=utf-8", prometheus.write),
    "openmetrics": Form(
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        lambda snapshot: prometheus.write(snapshot, openmetrics=True),
    ),
}

_SCRAPERS_TYPES = ("application/openmetrics-text", "application/vnd.google.protobuf")


def render(registry: Registry, form: str) -> bytes:
    """Write all values of ``registry``; see `prometheus.render`."""
    return registry.session.resolved_for_read().render(form, write)


def write(snapshot: Snapshot, form: str) -> bytes:
    """Write ``snapshot`` in the format of that name."""
    return FORMS[form].write(snapshot)


def negotiate(accept: str = "", wanted: str = "") -> str:
    """Return the name of the format that a client gets.

    A format has the quality of the range that matches it most closely: its media type with its version, its
    media type without one, ``text/*``, ``*/*``. The highest quality wins, then the closest range, then the
    first range, then JSON. A client that names a format of scrapers gets the text format where others get
    JSON: for ``*/*``, and if none of the formats is acceptable.

    Only the first 32 ranges within the first 2,048 characters are read, so no header costs more than a
    millisecond.

    Args:
        accept: The request's ``Accept`` header; several lines are one list, joined by commas.
        wanted: The value of ``?format=``, which wins; raises `InvalidArgument` if it is not a format.
    """
    if wanted in FORMS:
        return wanted
    if wanted:
        raise InvalidArgument("the format", got=wanted, expected=" or ".join(FORMS))
    parts = shortened(accept, ",").split(",", _MAX_RANGES)[:_MAX_RANGES]
    ranges = [_parsed(part) for part in parts]
    scraper = any(kind in _SCRAPERS_TYPES or (kind == "text/plain" and "version" in p) for kind, p in ranges)
    names = sorted(FORMS, key="prometheus".__ne__) if scraper else list(FORMS)
    best, best_rank = names[0], (0.0, 0, 0)
    for name in names:
        matching = [
            (closeness, -place, _quality(parameters))
            for place, (kind, parameters) in enumerate(ranges)
            if (closeness := _closeness(name, kind, parameters))
        ]
        closeness, place, quality = max(matching, default=(0, 0, 0.0))
        if quality and (quality, closeness, place) > best_rank:
            best, best_rank = name, (quality, closeness, place)
    return best


def shortened(text: str, separator: str) -> str:
    """Return the pieces of ``text`` that are complete within its first `MAX_CHARACTERS`."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rpartition(separator)[0]


def _parsed(part: str) -> tuple[str, dict[str, str]]:
    kind, *parameters = (piece.strip() for piece in part.lower().split(";"))
    pairs = (parameter.partition("=") for parameter in parameters)
    return kind, {name.strip(): value.strip().strip('"') for name, _, value in pairs}


_OWN_RANGES = {name: _parsed(form.content_type) for name, form in FORMS.items()}


def _closeness(name: str, kind: str, parameters: dict[str, str]) -> int:
    """Return how closely a range matches the format of that name; 0 if it does not."""
    own_kind, own_parameters = _OWN_RANGES[name]
    if kind == own_kind:
        version = parameters.get("version")
        return 3 if version is None else 4 if version == own_parameters.get("version") else 0
    return {"*/*": 1, own_kind.partition("/")[0] + "/*": 2}.get(kind, 0)


def _quality(parameters: dict[str, str]) -> float:
    try:
        quality = float(parameters.get("q", "1"))
    except ValueError:
        return 0.0
    return quality if 0.0 <= quality <= 1.0 else 0.0
