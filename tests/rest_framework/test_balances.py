"""What front ends may ask: balances, and a permission that reads one."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.urls import include, path
from rest_framework.authentication import TokenAuthentication
from rest_framework.authtoken.models import Token
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.test import APIClient, APIRequestFactory
from rest_framework.views import APIView

from django_meterly import guard
from django_meterly.db import from_now
from django_meterly.ledger.models import Hold
from django_meterly.models import Customer
from django_meterly.rest_framework.exceptions import Unavailable
from django_meterly.rest_framework.permissions import HasCredits
from tests.books import balance, fund, states

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.rest_framework.test_balances"),
]


class HasTen(HasCredits):
    amount = 10


class Gated(APIView):
    authentication_classes = [TokenAuthentication]
    permission_classes = [HasTen]

    def get(self, request: Any) -> Response:
        return Response("free")

    def post(self, request: Any) -> Response:
        return Response("done")


urlpatterns = [
    path("credits/", include("django_meterly.rest_framework.urls")),
    path("gated/", Gated.as_view()),
]


@pytest.fixture
def api(user: User) -> APIClient:
    api = APIClient()
    api.force_login(user)
    return api


@pytest.fixture
def by_token(user: User) -> APIClient:
    token = Token.objects.create(user=user)
    return APIClient(headers={"authorization": f"Token {token.key}"})


def test_the_caller_sees_their_own_balances(
    api: APIClient, user: User, any_ledger: Any
) -> None:
    fund(User.objects.create_user("bob"), 999)
    fund(user, 100)
    fund(user, 7, "gpu_seconds")
    with guard(user, 25):
        response = api.get("/credits/balances/")
    assert response["Cache-Control"] == "private, no-store"
    credits_ = {"unit": "image_credits", "available": 75, "reserved": 25}
    seconds = {"unit": "gpu_seconds", "available": 7, "reserved": 0, "balance": 7}
    found = sorted(response.json()["balances"], key=lambda each: -each["balance"])
    assert found == [{**credits_, "balance": 100}, seconds]
    assert api.get("/credits/balances/gpu_seconds/").json() == seconds


def test_credits_of_an_expired_hold_let_the_caller_in(
    api: APIClient, by_token: APIClient, user: User, any_ledger: Any
) -> None:
    fund(user, 10)
    guard(user, 10).lifecycle.reserve()
    assert by_token.post("/gated/").status_code == 403
    Hold.objects.update(expires_at=from_now(-1))
    balance = {"unit": "image_credits", "available": 10, "reserved": 0, "balance": 10}
    assert api.get("/credits/balances/").json() == {"balances": [balance]}
    assert api.get("/credits/balances/image_credits/").json() == balance
    assert by_token.post("/gated/").status_code == 200


def test_before_the_first_grant_there_is_nothing(api: APIClient, user: User) -> None:
    assert api.get("/credits/balances/").json() == {"balances": []}
    assert api.get("/credits/balances/tokens/").json() == {
        "unit": "tokens",
        "available": 0,
        "reserved": 0,
        "balance": 0,
    }
    assert api.get("/credits/balances/no%20unit/").status_code == 404
    # Reading registers nobody at the ledger.
    assert Customer.objects.get().customer_id is None


@pytest.mark.parametrize("url", ["/credits/balances/", "/credits/balances/tokens/"])
def test_nobody_sees_nothing_and_nothing_can_be_changed(
    api: APIClient, url: str
) -> None:
    assert APIClient().get(url).status_code in (401, 403)
    assert api.post(url).status_code == 405


def test_a_ledger_out_of_reach_is_a_503(
    api: APIClient, by_token: APIClient, user: User, remote: Any
) -> None:
    fund(user)
    for client, method, url in (
        (api, "get", "/credits/balances/"),
        (by_token, "post", "/gated/"),
    ):
        remote.meet("get_balances", "unsent")
        response = getattr(client, method)(url)
        assert (response.status_code, response["Retry-After"]) == (503, "5")
        assert response.json()["code"] == "unavailable"


def test_a_permission_asked_before_dispatch_reports_an_outage(
    user: User, remote: Any
) -> None:
    fund(user)
    # Schema generators ask like this: they never dispatch.
    view = Gated()
    request = Request(
        APIRequestFactory().post("/gated/"), parser_context={"view": view}
    )
    request.user = user
    remote.meet("get_balances", "unsent")
    with pytest.raises(Unavailable):
        view.check_permissions(request)


@pytest.mark.parametrize("amount", ["5", None, 2.5, True, -1], ids=repr)
def test_an_amount_that_nobody_can_have_is_an_error_that_names_it(
    by_token: APIClient, monkeypatch: pytest.MonkeyPatch, user: User, amount: Any
) -> None:
    fund(user, 10)
    monkeypatch.setattr(HasTen, "amount", amount)
    with pytest.raises(ValueError, match=r"^HasTen\.amount must be "):
        by_token.post("/gated/")


def test_has_credits_reads_and_holds_nothing(
    by_token: APIClient, user: User, any_ledger: Any
) -> None:
    assert by_token.get("/gated/").json() == "free"
    assert by_token.post("/gated/").json() == {
        "detail": "You have no credits left for this."
    }
    customer = fund(user, 9)
    assert by_token.post("/gated/").status_code == 403
    fund(user, 1)
    assert by_token.post("/gated/").json() == "done"
    assert APIClient().post("/gated/").status_code == 401
    assert balance(customer) == (10, 0)
    assert states() == []
