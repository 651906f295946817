"""A WSGI server for tests: it calls an application by PEP 3333, and keeps the answer."""

from __future__ import annotations

import io
from wsgiref.util import setup_testing_defaults


def call(application, **environ):
    """Call an application and return its body, which is neither read nor closed."""
    setup_testing_defaults(environ)
    environ.setdefault("wsgi.input", io.BytesIO())
    return application(environ, lambda status, headers, exc_info=None: None)


def environ_of(path="/", method="GET", body=b"", headers=(), **more):
    path, _, query = path.partition("?")
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "wsgi.input": io.BytesIO(body),
        "CONTENT_LENGTH": str(len(body)), **more,
    }  # fmt: skip
    environ |= {"HTTP_" + name.upper().replace("-", "_"): value for name, value in dict(headers).items()}
    setup_testing_defaults(environ)
    return environ


def ask(application, *arguments, **more):
    """Send one request and read its answer to the end; return the status, the headers and the body."""
    started = []
    body = application(environ_of(*arguments, **more), lambda *given: started.append(given[:2]))
    try:
        text = b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()
    status, headers = started[-1]
    return int(status[:3]), headers, text


def serving(body, status="200 OK", headers=()):
    """Return an application whose every answer is ``body``."""

    def application(environ, start_response):
        start_response(status, list(headers))
        return body

    return application


class Body:
    """A body that counts how often it is closed."""

    def __init__(self, pieces, fail_at=None):
        self.pieces, self.fail_at, self.closed = list(pieces), fail_at, 0

    def __iter__(self):
        for number, piece in enumerate(self.pieces):
            if number == self.fail_at:
                raise RuntimeError("in the middle")
            yield piece

    def close(self):
        self.closed += 1
