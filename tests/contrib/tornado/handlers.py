"""Handlers of every kind, and an application of them."""

from __future__ import annotations

import asyncio

from tornado import gen, web, websocket

from tapes.contrib.tornado import instrument


class Hello(web.RequestHandler):
    def get(self, *args, **kwargs):
        self.write("hello")

    post = get


class Other(Hello):
    pass


class Later(web.RequestHandler):
    async def get(self):
        await asyncio.sleep(0)
        self.write("later")


class Decorated(web.RequestHandler):
    @gen.coroutine
    def get(self):
        yield gen.moment
        self.write("decorated")


class Broken(web.RequestHandler):
    def get(self):
        raise RuntimeError("broken")


class Refusing(web.RequestHandler):
    def get(self):
        raise web.HTTPError(409)


class Finishing(web.RequestHandler):
    def get(self):
        self.set_status(410)
        raise web.Finish


class Chunks(web.RequestHandler):
    async def get(self):
        for number in range(3):
            self.write(str(number))
            await self.flush()


class FinishingLater(web.RequestHandler):
    async def get(self):
        self.write("some")
        await self.flush()
        raise web.Finish


class Gone(web.RequestHandler):
    def get(self):
        self.request.connection.stream.close()
        self.write("no client reads this")


class BrokenLater(web.RequestHandler):
    async def get(self):
        self.write("some")
        await self.flush()
        raise RuntimeError("in the middle")


class Overriding(web.RequestHandler):
    """Calls no super()."""

    def initialize(self):
        pass

    def prepare(self):
        pass

    def on_finish(self):
        pass

    def _log(self):
        pass

    def get(self):
        self.write("own")


class Unmade(web.RequestHandler):
    def initialize(self):
        raise RuntimeError("can't be made")


class BadHeader(web.RequestHandler):
    def get(self):
        self._reason = "a\r\nb"
        self.write("body")


class Echo(websocket.WebSocketHandler):
    def on_message(self, message):
        self.write_message(message)


RULES = [
    (r"/", Hello),
    (r"/users/(\d+)", Hello),
    (r"^/anchored/(?P<name>\w+)$", Other),
    (r"/later", Later),
    (r"/decorated", Decorated),
    (r"/broken", Broken),
    (r"/refusing", Refusing),
    (r"/finishing", Finishing),
    (r"/chunks", Chunks),
    (r"/broken-later", BrokenLater),
    (r"/finishing-later", FinishingLater),
    (r"/gone", Gone),
    (r"/price\$", Hello),
    (r"/overriding", Overriding),
    (r"/moved", web.RedirectHandler, {"url": "/"}),
    (r"/unmade", Unmade),
    (r"/bad-header", BadHeader),
    (r"/socket", Echo),
]


def app(registry, rules=RULES, settings=None, **options):
    application = web.Application(rules, **(settings or {}))
    assert instrument(application, registry, **options) is application
    return application
