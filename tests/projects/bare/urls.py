from __future__ import annotations

from typing import TYPE_CHECKING

from django.http import HttpResponse
from django.urls import path

from django_meterly import guard, meterly_guard
from tests.projects.work import draw

if TYPE_CHECKING:
    from django.http import HttpRequest


@meterly_guard("image_credits", 25)
def order(request: HttpRequest) -> HttpResponse:
    return HttpResponse(draw(request.POST))


def block(request: HttpRequest) -> HttpResponse:
    with guard(request.user, 25, "image_credits"):
        return HttpResponse(draw(request.POST))


urlpatterns = [path("order/", order), path("block/", block)]
