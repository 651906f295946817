"""A plain WSGI application; the adapter's `route` option names its routes.

gunicorn -w 4 wsgi_app:app
"""

import os

from tapes.contrib.wsgi import TapesMiddleware


def hello(environ, start_response):
    body = f"Hello, {environ['PATH_INFO'].rpartition('/')[2]}!\n".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def worker(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d\n" % os.getpid()]


def nothing(environ, start_response):
    start_response("404 Not Found", [("Content-Type", "text/plain")])
    return [b"There is nothing here.\n"]


ROUTES = {"/hello/": ("/hello/<name>", hello), "/worker": ("/worker", worker)}


def find(environ):
    path = environ["PATH_INFO"]
    return next((ROUTES[start] for start in ROUTES if path.startswith(start)), (None, nothing))


def routed(environ, start_response):
    return find(environ)[1](environ, start_response)


app = TapesMiddleware(routed, exclude=["/worker"], route=lambda environ: find(environ)[0])
