"""Django, with metrics for all of its workers; a small middleware sets the route's template.

gunicorn -w 4 django_app:app
"""

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

from tapes.contrib.wsgi import TapesMiddleware

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    MIDDLEWARE=["django_app.leave_route"],
    ROOT_URLCONF="django_app",
    SECRET_KEY="for an example",
)


def leave_route(get_response):
    def middleware(request):
        response = get_response(request)
        if request.resolver_match is not None:
            request.environ["tapes.route"] = "/" + request.resolver_match.route
        return response

    return middleware


def hello(request, name):
    return HttpResponse(f"Hello, {name}!\n")


def worker(request):
    return HttpResponse(f"{os.getpid()}\n")


urlpatterns = [path("hello/<name>", hello), path("worker", worker)]
app = TapesMiddleware(get_wsgi_application(), exclude=["/worker"])
