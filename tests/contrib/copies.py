"""Middlewares that pass on a copy of the environ or the scope."""

from __future__ import annotations


class Copying:
    """A middleware of a class, for ASGI."""

    def __init__(self, app, copying=dict):
        self.app = app
        self.copying = copying

    async def __call__(self, scope, receive, send):
        await self.app(self.copying(scope), receive, send)


def copying_function(app):
    """A middleware of a closure, for ASGI."""

    async def call(scope, receive, send):
        await app({**scope}, receive, send)

    return call


def copied(app):
    """A middleware of a lambda, for WSGI."""
    return lambda environ, start_response: app({**environ}, start_response)
