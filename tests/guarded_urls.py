"""Views whose guards the system checks have something to say about."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

from django.http import HttpResponse
from django.urls import include, path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.http import require_GET, require_http_methods, require_safe
from rest_framework.decorators import api_view
from rest_framework.response import Response
from rest_framework.viewsets import ViewSet

from django_meterly import meterly_guard
from django_meterly.mixins import MeterlyGuardMixin

guarded = meterly_guard("image_credits", 25)
reads = meterly_guard("image_credits", 25, methods=["GET"])


def view(request: Any) -> HttpResponse:
    return HttpResponse()


class Reads(View):
    def get(self, request: Any) -> HttpResponse:
        return HttpResponse()


class Writes(Reads):
    def post(self, request: Any) -> HttpResponse:
        return HttpResponse()


class ReadsGuarded(Writes):
    get = guarded(Reads.get)


class ReadsByMixin(MeterlyGuardMixin, Reads):
    guard_options = {"unit": "image_credits", "amount": 25}


class Handler(Writes):
    post = guarded(Writes.post)


class HandlerByMixin(MeterlyGuardMixin, Handler):
    pass


@method_decorator(guarded, name="dispatch")
class Dispatch(Writes):
    pass


@api_view(["GET"])
def api(request: Any) -> Response:
    return Response()


class Posters(ViewSet):
    def list(self, request: Any) -> Response:
        return Response()

    def create(self, request: Any) -> Response:
        return Response()


class ReadOnlyPosters(Posters):
    http_method_names = ["get", "options"]


class OnlyOptions(Writes):
    @guarded
    def options(self, request: Any) -> HttpResponse:
        return HttpResponse()


async def aview(request: Any) -> HttpResponse:
    return HttpResponse()


def request_method_list(request_method_list: Any) -> Any:
    """A decorator that only looks like Django's from outside."""

    def decorator(function: Any) -> Any:
        @wraps(function)
        def inner(request: Any) -> Any:
            return function(request, request_method_list)

        return inner

    return decorator


both = {"get": "list", "post": "create"}
handler = [path("handler/", Handler.as_view(), name="handler")]
dispatch = [path("dispatch/", Dispatch.as_view(), name="dispatch")]
urlpatterns = [
    path("never/function/", guarded(require_GET(view)), name="never-1"),
    path("never/above/", require_safe(guarded(view)), name="never-2"),
    path("never/class/", guarded(Reads.as_view()), name="never-3"),
    path("never/handler/", ReadsGuarded.as_view(), name="never-4"),
    path("never/mixin/", ReadsByMixin.as_view(), name="never-5"),
    path("never/api/", guarded(api), name="never-6"),
    path("never/set/", guarded(Posters.as_view({"get": "list"})), name="never-7"),
    path("never/async/", guarded(require_safe(aview)), name="never-8"),
    path("never/partial/", guarded(partial(require_GET(view), x=1)), name="never-9"),
    path(
        "never/as-view/",
        guarded(Writes.as_view(http_method_names=["get"])),
        name="never-10",
    ),
    path("never/read-only/", guarded(ReadOnlyPosters.as_view(both)), name="never-11"),
    path("never/part/", guarded(partial(Reads.as_view(), x=1)), name="never-12"),
    path("never/options/", OnlyOptions.as_view(), name="never-13"),
    path("fine/lookalike/", guarded(request_method_list(["GET"])(view))),
    path("fine/asked/async/", reads(require_safe(aview))),
    path("fine/function/", guarded(view), name="fine-1"),
    path("fine/methods/", guarded(require_http_methods(["GET", "POST"])(view))),
    path("fine/asked/", reads(require_GET(view))),
    path("fine/class/", guarded(Writes.as_view())),
    path("fine/asked/class/", reads(Reads.as_view())),
    path("fine/mixin/", HandlerByMixin.as_view()),
    path("fine/set/", guarded(Posters.as_view({"get": "list", "post": "create"}))),
    path("plain/", require_GET(view), name="plain"),
    path("posters/", include(([path("render/", view, name="render")], "posters"))),
]
