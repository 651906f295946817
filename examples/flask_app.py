"""Flask, with metrics for all of its workers.

gunicorn -w 4 flask_app:app                       # sync, gthread, gevent or tornado workers
uwsgi --http :8000 --master --processes 4 --module flask_app:app
granian --interface wsgi --workers 4 flask_app:app
"""

import os

from flask import Flask

from tapes.contrib.flask import Tapes

app = Flask(__name__)
metrics = Tapes(app)


@app.get("/hello/<name>")
def hello(name):
    return f"Hello, {name}!\n"


@app.get("/worker")
@metrics.exclude
def worker():
    return f"{os.getpid()}\n"
