"""What ``/metrics`` answers, whoever serves it."""

from __future__ import annotations

from urllib.parse import parse_qs

from tapes.errors import InvalidArgument, TapesError
from tapes.exposition import FORMS, negotiate, render
from tapes.registry import Registry

__all__ = ["Answer", "answer", "plain"]

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers without ``Content-Length``, and body."""


def answer(registry: Registry, accept: str = "", query: str = "") -> Answer:
    """Return the answer to a request for all values of ``registry``.

    Args:
        registry: Any registry; a connected one answers for the whole service.
        accept: The request's ``Accept`` header, or empty.
        query: The request's query string, or empty; its ``format`` wins over ``accept``.
    """
    wanted = parse_qs(query).get("format", [""])[-1]
    try:
        form = negotiate(accept, wanted)
        body = render(registry, form)
    except InvalidArgument as error:
        return plain(400, f"{error}.")
    except TapesError as error:
        return plain(503, f"{error}.")
    headers = {"Content-Type": FORMS[form].content_type}
    return 200, {**headers, "Vary": "Accept", "Cache-Control": "no-store"}, body


def plain(status: int, sentence: str) -> Answer:
    """Return an answer of one plain sentence."""
    headers = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
    return status, headers, sentence.encode() + b"\n"
