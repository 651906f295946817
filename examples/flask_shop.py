"""A small shop in Flask whose every worker answers ``/metrics`` for the whole service.

gunicorn -w 4 -c python:tapes.contrib.gunicorn_conf flask_shop:app
"""

import os
import random
import time

from flask import Flask, abort, jsonify

import tapes
from tapes.contrib.flask import TapesMiddleware

app = Flask(__name__)
app.wsgi_app = TapesMiddleware(app.wsgi_app)

orders = tapes.counter("shop.orders")
basket = tapes.histogram("shop.basket.items")
lookup = tapes.timer("shop.price.lookup")

tapes.describe("shop.orders", "Orders that were placed.")
tapes.describe("shop.basket.items", "Articles per order.")
tapes.describe("shop.price.lookup", "Time to look up a price.")


@lookup.time()
def price_of(article: int) -> float:
    time.sleep(random.uniform(0.0005, 0.003))
    return 9.5 + article


@app.after_request
def name_worker(response):
    response.headers["X-Worker"] = str(os.getpid())
    return response


@app.get("/")
def index():
    return "the shop"


@app.get("/articles/<int:number>")
def article(number):
    if number > 900:
        abort(404)
    return jsonify(number=number, price=price_of(number))


@app.post("/orders")
def order():
    orders.increment()
    basket.update(random.randint(1, 12))
    return jsonify(placed=True), 201


@app.get("/old-catalogue")
def gone():
    abort(410)


@app.get("/broken")
def broken():
    raise RuntimeError("this page always fails")
