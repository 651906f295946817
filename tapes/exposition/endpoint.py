"""The answers of ``/metrics``, for all adapters and servers."""

from __future__ import annotations

import contextlib
import hmac
import os
from urllib.parse import parse_qs

from tapes import forks
from tapes.errors import InvalidArgument, TapesError
from tapes.exposition import FORMS, MAX_CHARACTERS, negotiate, render, shortened
from tapes.registry import Registry
from tapes.sharing import Pressure

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers without ``Content-Length``, and body."""

MAX_READERS = 32
"""Maximum readers that a process answers at once."""
_pressure = Pressure(MAX_READERS)
forks.renew_in_child(_pressure.reset)

TOKEN_VARIABLE = "TAPES_METRICS_TOKEN"  # noqa: S105 - it names the token
"""The environment variable with the token that readers must send, if it is set."""


def answer(registry: Registry, accept: str = "", query: str = "") -> Answer:
    """Return the answer to a request for all values of ``registry``, or of its service if it is connected.

    ``accept`` is the request's ``Accept`` header, its lines joined by commas. The query's ``format`` wins.
    """
    wanted = parse_qs(shortened(query, "&")).get("format", [""])[-1]
    try:
        form = negotiate(accept, wanted)
        with _pressure.reader():
            body = render(registry, form)
    except InvalidArgument as error:
        return plain(400, f"{error}.")
    except TapesError as error:
        return plain(503, f"{error}.")
    headers = {"Content-Type": FORMS[form].content_type}
    return 200, {**headers, "Vary": "Accept", "Cache-Control": "no-store"}, body


def refusal(method: str, authorization: str = "", allowed: bool | None = None) -> Answer | None:
    """Return the answer to a request that may not read the metrics; ``None`` if it may.

    The application's guard decides what is ``allowed``. Without a guard (``None``), the request must have the
    token of `TOKEN_VARIABLE`, if that is set.
    """
    if method not in ("GET", "HEAD"):
        status, headers, body = plain(405, "The metrics can only be read.")
        return status, {**headers, "Allow": "GET, HEAD"}, body
    if allowed is not None:
        return None if allowed else plain(403, "You may not read the metrics.")
    if TOKEN_VARIABLE not in os.environ:
        return None
    token = os.fsencode(os.environ[TOKEN_VARIABLE]).strip()  # files of secrets often end with a line's end
    if not token:
        return plain(403, f"{TOKEN_VARIABLE} is set, but empty, so all readers are refused.")
    is_short = len(authorization) <= len(token) + MAX_CHARACTERS
    scheme, _, shown = authorization.partition(" ") if is_short else ("", "", "")
    if scheme.lower() == "bearer":
        with contextlib.suppress(UnicodeEncodeError):  # headers are decoded as latin-1
            if hmac.compare_digest(shown.strip().encode("latin-1"), token):
                return None
    status, headers, body = plain(401, f"Send the token of {TOKEN_VARIABLE}: Authorization: Bearer TOKEN.")
    return status, {**headers, "WWW-Authenticate": 'Bearer realm="metrics"'}, body


def plain(status: int, sentence: str) -> Answer:
    """Return an answer of one plain sentence."""
    headers = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
    return status, headers, sentence.encode() + b"\n"
