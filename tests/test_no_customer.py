"""Users who are logged in, and for whom nobody pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.generic import TemplateView
from rest_framework.decorators import api_view
from rest_framework.response import Response

from django_meterly import meterly_guard
from django_meterly.ledger.models import Entry
from django_meterly.mixins import MeterlyGuardMixin
from tests.books import states

if TYPE_CHECKING:
    from django.contrib.auth.models import User
    from django.test import AsyncClient, Client

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_no_customer"),
]
HTML, PROBLEM = "text/html", "application/problem+json"
ran = []


def team_of(request: Any, *args: Any, **kwargs: Any) -> None:
    """Return nobody: this user has no team."""


guarded = meterly_guard("image_credits", 25, customer=team_of)


@guarded
def draw(request: HttpRequest) -> HttpResponse:
    ran.append(True)
    return HttpResponse()


@guarded
async def adraw(request: HttpRequest) -> HttpResponse:
    ran.append(True)
    return HttpResponse()


class Draw(MeterlyGuardMixin, TemplateView):
    guard_options = {"unit": "image_credits", "amount": 25, "customer": team_of}

    def post(self, request: HttpRequest) -> HttpResponse:
        return draw.__wrapped__(request)  # type: ignore[attr-defined]


@guarded
@api_view(["POST"])
def api(request: Any) -> Response:
    ran.append(True)
    return Response()


urlpatterns = [
    path("draw/", draw),
    path("adraw/", adraw),
    path("class/", Draw.as_view()),
    path("api/", api),
]


@pytest.fixture(autouse=True)
def nothing_has_run() -> None:
    ran.clear()


@pytest.mark.parametrize("url", ["/draw/", "/adraw/", "/class/", "/api/"])
def test_f68_a_known_user_without_a_payer_is_a_403(
    client: Client, user: User, url: str
) -> None:
    client.force_login(user)
    response = client.post(url, headers={"Accept": "application/json"})
    assert (response.status_code, response.json()["code"]) == (403, "no_customer")
    assert "no-store" in response["Cache-Control"]
    assert states() == ran == []
    assert not Entry.objects.exists()


def test_f68_a_browser_gets_a_page(client: Client, user: User) -> None:
    client.force_login(user)
    response = client.post("/draw/", headers={"Accept": HTML})
    assert response.status_code == 403
    assert "Nobody pays for your account" in response.content.decode()


@pytest.mark.parametrize("url", ["/draw/", "/class/", "/api/"])
def test_f68_who_is_not_logged_in_is_asked_to_log_in(client: Client, url: str) -> None:
    problem = client.post(url, headers={"Accept": "application/json"})
    assert problem.status_code == (403 if url == "/api/" else 401)
    assert problem.headers["Content-Type"] in (PROBLEM, "application/json")
    assert b"no_customer" not in problem.content
    if url != "/api/":
        page = client.post(url, headers={"Accept": HTML})
        assert page.status_code == 302
        assert "login" in page["Location"]
    assert states() == ran == []


def test_f68_an_async_request_is_answered_alike(
    async_client: AsyncClient, user: User
) -> None:
    async_client.force_login(user)
    response = async_to_sync(async_client.post)("/adraw/", headers={"Accept": PROBLEM})
    assert response.status_code == 403
    assert ran == []
