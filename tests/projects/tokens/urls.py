from __future__ import annotations

from typing import TYPE_CHECKING

from django.urls import include, path
from rest_framework.authtoken.views import obtain_auth_token
from rest_framework.response import Response
from rest_framework.views import APIView

from django_meterly.mixins import MeterlyGuardMixin
from tests.projects.work import draw

if TYPE_CHECKING:
    from rest_framework.request import Request


class Order(MeterlyGuardMixin, APIView):
    guard_options = {"unit": "image_credits", "amount": 25}

    def post(self, request: Request) -> Response:
        return Response({"poster": draw(request.data)})


urlpatterns = [
    path("order/", Order.as_view()),
    path("token/", obtain_auth_token),
    path("credits/", include("django_meterly.rest_framework.urls")),
]
