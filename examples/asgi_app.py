"""A plain ASGI application without lifespan; it sets the route in the scope.

hypercorn --worker-class trio --workers 4 asgi_app:app
"""

import os

from tapes.contrib.asgi import TapesMiddleware


async def routed(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError(f"this application doesn't support {scope['type']}")
    status, body = 404, b"There is nothing here.\n"
    if scope["path"].startswith("/hello/"):
        scope["tapes.route"] = "/hello/<name>"
        status, body = 200, f"Hello, {scope['path'].rpartition('/')[2]}!\n".encode()
    elif scope["path"] == "/worker":
        status, body = 200, b"%d\n" % os.getpid()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


app = TapesMiddleware(routed, exclude=["/worker"])
