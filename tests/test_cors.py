"""Front ends on another origin, with django-cors-headers set as the docs say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.http import HttpResponse
from django.urls import path

from django_meterly import meterly_guard
from tests.books import balance, fund, states
from tests.pages import DOCS, blocks

if TYPE_CHECKING:
    from django.contrib.auth.models import User
    from django.test import Client

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_cors"),
]
ORIGIN = "https://app.example.com"


@meterly_guard("image_credits", 25)
def draw(request: Any) -> HttpResponse:
    return HttpResponse("drawn")


urlpatterns = [path("draw/", draw)]


@pytest.fixture(autouse=True)
def as_documented(settings: Any) -> None:
    (block,) = (
        block
        for block in blocks(DOCS / "rest-framework.md")
        if "CORS_ALLOW_HEADERS" in block.source
    )
    said: dict[str, Any] = {}
    exec(block.source, said)
    for name in said:
        if name.isupper():
            setattr(settings, name, said[name])
    settings.MIDDLEWARE = [
        "corsheaders.middleware.CorsMiddleware",
        *settings.MIDDLEWARE,
    ]


def test_f48_a_preflight_allows_the_key_and_never_meets_the_guard(
    client: Client,
) -> None:
    response = client.options(
        "/draw/",
        headers={
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "idempotency-key",
        },
    )
    assert response["Access-Control-Allow-Origin"] == ORIGIN
    assert "idempotency-key" in response["Access-Control-Allow-Headers"]
    assert "Allow" not in response
    assert states() == []


def test_a_script_reads_when_to_come_back(
    client: Client, user: User, remote: Any
) -> None:
    customer = fund(user)
    client.force_login(user)
    headers = {"Origin": ORIGIN, "Idempotency-Key": "one"}
    assert client.post("/draw/", headers=headers).content == b"drawn"
    again = client.post("/draw/", headers=headers)
    assert again.status_code == 409
    assert balance(customer) == (75, 0)
    remote.meet("reserve_credits", "unsent")
    down = client.post("/draw/", headers={"Origin": ORIGIN})
    assert (down.status_code, down["Retry-After"]) == (503, "5")
    # Cache-Control is safelisted, and so is Content-Type.
    assert down["Access-Control-Expose-Headers"] == "retry-after"
    sent = {name.lower() for name in down.headers}
    ours = sent - {"content-type", "content-length", "cache-control", "vary"}
    assert {name for name in ours if not name.startswith(("access-", "x-"))} == {
        "retry-after"
    }
