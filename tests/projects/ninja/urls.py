from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.urls import path
from ninja import NinjaAPI, Schema
from ninja.decorators import decorate_view
from ninja.security import django_auth

from django_meterly import meterly_guard
from tests.projects.work import draw

api = NinjaAPI(auth=django_auth)


class Poster(Schema):
    how: str = ""


@api.post("/order")
@decorate_view(meterly_guard("image_credits", 25))
def order(request: Any, poster: Poster) -> dict[str, str]:
    return {"poster": draw([poster.how])}


urlpatterns = [path("api/", api.urls), path("admin/", admin.site.urls)]
