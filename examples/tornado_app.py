"""Tornado, with metrics for all of its processes.

python tornado_app.py 8000 4                      # forked by Tornado itself
gunicorn -w 4 -k tornado tornado_app:app
"""

import os
import sys

from tornado import httpserver, ioloop, web

from tapes.contrib.tornado import MeteredHandler, instrument


class Hello(MeteredHandler):
    async def get(self, name):
        self.write(f"Hello, {name}!\n")


class Worker(web.RequestHandler):
    def get(self):
        self.write(f"{os.getpid()}\n")


app = instrument(web.Application([(r"/hello/(\w+)", Hello), ("/worker", Worker)]), exclude=["/worker"])

if __name__ == "__main__":
    port, processes = (int(argument) for argument in sys.argv[1:])
    server = httpserver.HTTPServer(app)
    server.bind(port, "127.0.0.1")
    server.start(processes)
    ioloop.IOLoop.current().start()
