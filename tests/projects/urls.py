"""A page with a form that orders a poster, and the admin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib import admin
from django.http import HttpResponse
from django.middleware.csrf import get_token
from django.urls import path

from django_meterly import meterly_guard
from tests.projects.work import draw

if TYPE_CHECKING:
    from django.http import HttpRequest


@meterly_guard("image_credits", 25)
def order(request: HttpRequest) -> HttpResponse:
    if request.method != "POST":
        token = get_token(request)
        return HttpResponse(
            "<form method=post>"
            f"<input type=hidden name=csrfmiddlewaretoken value={token}><button>"
        )
    return HttpResponse(draw(request.POST))


urlpatterns = [path("order/", order), path("admin/", admin.site.urls)]
