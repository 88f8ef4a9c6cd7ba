"""What somebody has paid for is kept by no cache that others read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from django.core.cache import cache
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.views import View
from django.views.decorators.cache import cache_control, never_cache
from rest_framework.decorators import api_view
from rest_framework.response import Response
from rest_framework.views import APIView

from django_meterly import guard, meterly_guard
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.rest_framework.exceptions import exception_handler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_cache_control"),
]
paid = meterly_guard("image_credits", 25, methods=["GET", "POST"])


def plain(request: Any) -> Any:
    return HttpResponse("done")


async def aplain(request: Any) -> Any:
    return HttpResponse("done")


def template(request: Any) -> Any:
    return TemplateResponse(request, "tests/good.html", {"value": 1})


def stream(request: Any) -> Any:
    return StreamingHttpResponse(iter([b"done"]))


async def astream(request: Any) -> Any:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"done"

    return StreamingHttpResponse(chunks())


def file(request: Any) -> Any:
    return FileResponse(io.BytesIO(b"done"), filename="poster.png")


@api_view(["GET", "POST"])
def rest(request: Any) -> Any:
    return Response({"done": True})


class Handlers:
    def get(self, request: Any) -> Any:
        return HttpResponse("done")

    post = get


class ByMixin(MeterlyGuardMixin, Handlers, View):
    guard_options = {"unit": "image_credits", "amount": 25, "methods": ["GET", "POST"]}


class RestByMixin(MeterlyGuardMixin, Handlers, APIView):
    guard_options = ByMixin.guard_options


class ByHandler(View):
    get = post = paid(Handlers.get)


class RestByHandler(APIView):
    get = post = paid(Handlers.get)


class RestWithBlock(APIView):
    def get_exception_handler(self) -> Any:
        return exception_handler

    def get(self, request: Any) -> Any:
        with guard(request.user, 25, "image_credits"):
            raise AssertionError("There are credits.")


VIEWS = {
    "plain": paid(plain),
    "aplain": paid(aplain),
    "template": paid(template),
    "stream": paid(stream),
    "astream": paid(astream),
    "file": paid(file),
    "rest": paid(rest),
    "by_mixin": ByMixin.as_view(),
    "rest_by_mixin": RestByMixin.as_view(),
    "by_handler": ByHandler.as_view(),
    "rest_by_handler": RestByHandler.as_view(),
}


def says(header: str) -> Any:
    def view(request: Any) -> Any:
        return HttpResponse("done", headers={"Cache-Control": header})

    return paid(view)


SAID = {
    "public": "public",
    "max-age=60, public": "max-age=60, public",
    "s-maxage=60": "s-maxage=60",
    "private": "private",
    "no-store": "no-store",
    "Public": "Public",
    # It does not say for whom.
    "max-age=60": "max-age=60, private",
    "no-cache": "no-cache, private",
}
urlpatterns = [
    *[path(f"{name}/", view) for name, view in VIEWS.items()],
    *[path(f"says/{number}/", says(text)) for number, text in enumerate(SAID)],
    path("around/", cache_control(public=True, max_age=60)(paid(plain))),
    path("never/", paid(never_cache(plain))),
    path("block/", RestWithBlock.as_view()),
    path("free/", meterly_guard("image_credits", 25)(plain)),
]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("method", ["get", "post"])
def test_f55_what_was_paid_for_is_private(payer, name, method):
    response = getattr(payer, method)(f"/{name}/")
    assert response.status_code == 200
    assert response["Cache-Control"] == "private"


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("accept", ["application/json", "text/html"])
def test_f55_so_is_its_refusal(client, user, joined, name, accept):
    client.force_login(user)
    headers = {"Accept": accept}
    if name.startswith("rest"):
        headers = {}
    response = client.get(f"/{name}/", headers=headers)
    assert response.status_code == 402
    assert response["Cache-Control"] == "private, no-store"


def test_f55_so_is_the_refusal_of_a_block_in_rest_framework(client, user, joined):
    client.force_login(user)
    response = client.get("/block/")
    assert response.status_code == 402
    assert response["Cache-Control"] == "private, no-store"


@pytest.mark.parametrize(("number", "text"), list(enumerate(SAID)))
def test_f55_a_view_may_say_otherwise(payer, number, text):
    assert payer.get(f"/says/{number}/")["Cache-Control"] == SAID[text]


def test_f55_so_may_decorators(payer):
    said = set(payer.get("/around/")["Cache-Control"].split(", "))
    assert said == {"public", "max-age=60"}
    never = payer.get("/never/")["Cache-Control"]
    assert never == "max-age=0, no-cache, no-store, must-revalidate, private"
    # What is free is not the guard's.
    assert "Cache-Control" not in payer.get("/free/")


@pytest.mark.parametrize("name", ["plain", "template", "rest"])
def test_f55_djangos_own_cache_gives_it_to_nobody_else(payer, settings, name):
    cache.clear()
    settings.MIDDLEWARE = [
        "django.middleware.cache.UpdateCacheMiddleware",
        *settings.MIDDLEWARE,
        "django.middleware.cache.FetchFromCacheMiddleware",
    ]
    try:
        assert payer.get(f"/{name}/").status_code == 200
        payer.logout()
        assert payer.get(f"/{name}/").status_code != 200
    finally:
        cache.clear()
