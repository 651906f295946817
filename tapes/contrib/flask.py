"""Request metrics and ``/metrics`` for Flask.

app.wsgi_app = TapesMiddleware(app.wsgi_app)
"""

from tapes.contrib.wsgi import TapesMiddleware

__all__ = ["TapesMiddleware"]
