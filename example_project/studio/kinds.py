"""One guarded view of each kind. Each sells a story for one credit.

``../kinds.py`` calls them. Readers who leave early are charged: this is the default of
``ON_DISCONNECT`` for streams and cancelled async views.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from django.http import HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.views import View
from rest_framework import routers, viewsets
from rest_framework.decorators import api_view
from rest_framework.response import Response
from rest_framework.views import APIView

from django_meterly import meterly_guard
from django_meterly.mixins import MeterlyGuardMixin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from django.http import HttpRequest
    from rest_framework.request import Request

STORY = "Once upon a time a poster wanted to be seen by everybody."

paid = meterly_guard("image_credits", 1)


def _pause(request: Any) -> float:
    """Return the seconds between two words, which give readers time to leave."""
    return float(request.GET.get("pause", "0"))


def _words(request: Any) -> Iterator[str]:
    for word in STORY.split():
        yield f"{word}\n"
        time.sleep(_pause(request))


async def _awords(request: Any) -> AsyncIterator[str]:
    for word in STORY.split():
        yield f"{word}\n"
        await asyncio.sleep(_pause(request))


@paid
def function(request: HttpRequest) -> HttpResponse:
    return HttpResponse("".join(_words(request)))


@paid
async def async_function(request: HttpRequest) -> HttpResponse:
    return HttpResponse("".join([word async for word in _awords(request)]))


class ClassBased(MeterlyGuardMixin, View):
    guard_options = {"unit": "image_credits", "amount": 1}

    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("".join(_words(request)))


@paid
@api_view(["POST"])
def api_function(request: Request) -> Response:
    return Response(list(_words(request)))


class ApiClass(MeterlyGuardMixin, APIView):
    guard_options = {"unit": "image_credits", "amount": 1}

    def post(self, request: Request) -> Response:
        return Response(list(_words(request)))


class ApiSet(MeterlyGuardMixin, viewsets.ViewSet):
    @paid
    def create(self, request: Request) -> Response:
        return Response(list(_words(request)))


@paid
def template(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(
        request, "studio/story.html", {"words": list(_words(request))}
    )


@paid
def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_words(request))


@paid
async def async_stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(_awords(request))


router = routers.SimpleRouter()
router.register("api_set", ApiSet, basename="api_set")

urlpatterns = [
    path("function/", function),
    path("async_function/", async_function),
    path("class_based/", ClassBased.as_view()),
    path("api_function/", api_function),
    path("api_class/", ApiClass.as_view()),
    path("template/", template),
    path("stream/", stream),
    path("async_stream/", async_stream),
    *router.urls,
]
