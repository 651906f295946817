"""The example for several processes from Tapes 0.3, in Python 3.

Every process counts, and port 8889 answers for all of them.
"""

from tornado import gen, httpserver, ioloop, web

from tapes import DistributedRegistry
from tapes.distributed.registry import RegistryAggregator
from tapes.reporting.http import HTTPReporter

registry = DistributedRegistry()


class TimedHandler(web.RequestHandler):
    timer = registry.timer("my.timer")

    @gen.coroutine
    def get(self):
        with TimedHandler.timer.time():
            self.write("finished")


application = web.Application([("/", TimedHandler)])

RegistryAggregator(HTTPReporter(8889)).start()

server = httpserver.HTTPServer(application)
server.bind(8888, address="127.0.0.1")

try:
    server.start(0)
    registry.connect()
    ioloop.IOLoop.current().start()
except KeyboardInterrupt:
    pass  # ctrl-C reaches every process; each sends its final update when it exits
