"""Guarded operations of django-ninja, as docs/guard.md shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.http import HttpResponse
from django.urls import path

from django_meterly import get_client, meterly_guard
from django_meterly.errors import MeterlyUsageError
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, states

ninja = pytest.importorskip("ninja")

from ninja.decorators import decorate_view  # noqa: E402
from ninja.errors import HttpError  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.contrib.auth.models import User
    from django.test import AsyncClient, Client

    from django_meterly.models import Customer
    from django_meterly.testing import faults

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_ninja"),
]
PROBLEM = "application/problem+json"
ran: list[str] = []


class Order(ninja.Schema):
    pages: int


api = ninja.NinjaAPI()
router = ninja.Router()
credits_25 = meterly_guard("image_credits", 25)


def price(request: Any, number: int) -> int:
    return int(number)


def poster(request: Any, order: Order | None = None) -> Any:
    ran.append("poster")
    return {"url": "/posters/7"}


async def aposter(request: Any, order: Order | None = None) -> Any:
    ran.append("poster")
    return {"url": "/posters/7"}


def operation(function: Any) -> Any:
    """Return a new function, because ninja notes in it that it is an operation."""
    if function is aposter:

        async def arun(request: Any) -> Any:
            return await function(request)

        return arun

    def run(request: Any) -> Any:
        return function(request)

    return run


def named(function: Any, name: str) -> Any:
    """Return *function* by a name of its own, which the journal keeps."""
    function.__name__ = function.__qualname__ = name
    return function


def below(register: Callable[[str], Any], url: str, function: Any) -> None:
    register(url)(decorate_view(credits_25)(named(operation(function), url[1:])))


def above(register: Callable[[str], Any], url: str, function: Any) -> None:
    decorate_view(credits_25)(register(url)(named(operation(function), url[1:])))


#: Every way of ninja to make an operation, with the guard where it belongs.
WAYS = {
    "post": lambda url, function: below(api.post, url, function),
    "above": lambda url, function: above(api.post, url, function),
    "router": lambda url, function: below(router.post, url, function),
    "operation": lambda url, function: below(
        lambda url: api.api_operation(["POST", "PATCH"], url), url, function
    ),
    "put": lambda url, function: below(api.put, url, function),
    "patch": lambda url, function: below(api.patch, url, function),
    "delete": lambda url, function: below(api.delete, url, function),
}
for kind, function in (("sync", poster), ("async", aposter)):
    for way, make in WAYS.items():
        make(f"/{way}-{kind}", function)


@api.post("/orders")
@decorate_view(credits_25)
def order(request: Any, order: Order) -> Any:
    ran.append("order")
    return order.dict()


@api.post("/aorders")
@decorate_view(credits_25)
async def aorder(request: Any, order: Order) -> Any:
    ran.append("order")
    return order.dict()


@api.post("/priced/{number}")
@decorate_view(meterly_guard("image_credits", price))
def priced(request: Any, number: int) -> Any:
    request.meterly.charge(number - 1)
    return {}


@api.post("/failing/{how}", response={200: dict, 402: dict})
@decorate_view(credits_25)
def failing(request: Any, how: str) -> Any:
    if how == "status":
        return ninja.Status(402, {})
    if how == "http":
        raise HttpError(404, "not found")
    raise ZeroDivisionError


@api.post("/wrong")
@credits_25
def wrong(request: Any) -> Any:
    ran.append("wrong")
    return {"url": "/posters/7"}


@api.post("/awrong")
@credits_25
async def awrong(request: Any) -> Any:
    ran.append("wrong")
    return {"url": "/posters/7"}


@api.post("/plain", url_name="plain")
def plain(request: Any) -> Any:
    ran.append("plain")
    return {}


api.add_router("/routed", router)
urlpatterns = [path("api/", api.urls), path("other/", lambda request: HttpResponse())]


@pytest.fixture(autouse=True)
def nothing_has_run() -> None:
    ran.clear()


@pytest.fixture
def customer(user: User, joined: None) -> Customer:
    return fund(user)


def url_of(way: str, kind: str) -> str:
    return f"/api/{'routed/' if way == 'router' else ''}{way}-{kind}"


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("way", WAYS)
def test_f61_an_operation_is_charged_once(
    payer: Client, customer: Customer, way: str, kind: str
) -> None:
    method = way if way in ("put", "patch", "delete") else "post"
    response = getattr(payer, method)(url_of(way, kind))
    assert (response.status_code, response.json()) == (200, {"url": "/posters/7"})
    assert (ran, states()) == (["poster"], ["committed"])
    assert balance(customer) == (75, 0)
    assert_books_balance()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_f61_an_async_server_charges_alike(
    async_client: AsyncClient, user: User, customer: Customer, kind: str
) -> None:
    async_client.force_login(user)
    response = async_to_sync(async_client.post)(url_of("post", kind))
    assert response.status_code == 200
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("url", ["/api/orders", "/api/aorders"])
@pytest.mark.parametrize("body", [{"pages": "many"}, {}, None])
def test_f61_what_ninja_does_not_validate_is_released(
    payer: Client, customer: Customer, url: str, body: Any
) -> None:
    response = payer.post(url, body, content_type="application/json")
    assert response.status_code in (400, 422)
    assert (ran, states()) == ([], ["released"])
    assert payer.post(url, {"pages": 3}, content_type="application/json").json() == {
        "pages": 3
    }
    assert balance(customer) == (75, 0)
    assert_books_balance()


@pytest.mark.parametrize("how", ["status", "http", "crash"])
def test_f61_an_operation_that_fails_is_released(
    payer: Client, customer: Customer, how: str
) -> None:
    payer.raise_request_exception = False
    status = {"status": 402, "http": 404, "crash": 500}[how]
    assert payer.post(f"/api/failing/{how}").status_code == status
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


def test_f61_a_function_gets_what_is_in_the_path(
    payer: Client, customer: Customer
) -> None:
    assert payer.post("/api/priced/30").status_code == 200
    assert balance(customer) == (71, 0)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_refusals_are_problems(
    payer: Client, customer: Customer, remote: faults, kind: str
) -> None:
    get_client().use_credits(str(customer.customer_id), 75)
    url = url_of("post", kind)
    key = {"Idempotency-Key": "k"}

    def refused(**headers: Any) -> Any:
        response = payer.post(url, headers=headers)
        assert response.headers["Content-Type"] == PROBLEM
        assert response.json()["status"] == response.status_code
        return response.status_code, response.json()["code"]

    assert payer.post(url, headers=key).status_code == 200
    assert refused() == (402, "insufficient_credits")
    assert refused(**key) == (409, "duplicate")
    assert refused(**{"Idempotency-Key": "a b"}) == (400, "invalid_idempotency_key")
    remote.meet("reserve_credits", "unsent")
    assert refused() == (503, "unavailable")
    payer.logout()
    assert refused() == (401, "unauthenticated")
    assert ran == ["poster"]
    assert balance(customer) == (0, 0)


def test_a_key_is_for_one_operation(payer: Client, customer: Customer) -> None:
    key = {"Idempotency-Key": "k"}
    assert payer.post("/api/post-sync", headers=key).status_code == 200
    response = payer.post("/api/above-sync", headers=key)
    assert (response.status_code, response.json()["code"]) == (
        422,
        "idempotency_mismatch",
    )
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("url", ["/api/wrong", "/api/awrong"])
def test_f61_a_guard_below_the_operation_is_refused(
    payer: Client, customer: Customer, url: str
) -> None:
    with pytest.raises(TypeError, match=r"has returned dict.*decorate_view") as caught:
        payer.post(url)
    assert "@decorate_view(meterly_guard(...)) below @api.post(...)" in str(
        caught.value
    )
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


@pytest.mark.parametrize("function", [poster, aposter])
@pytest.mark.parametrize("way", ["post", "router", "operation"])
def test_f61_a_guard_above_the_operation_is_refused(function: Any, way: str) -> None:
    other, made = ninja.NinjaAPI(urls_namespace="other"), operation(function)
    {
        "post": other.post,
        "router": ninja.Router().post,
        "operation": lambda url: other.api_operation(["POST"], url),
    }[way]("/x")(made)
    with pytest.raises(TypeError, match=r"guards nothing on a?run, which") as info:
        credits_25(made)
    assert "@decorate_view(meterly_guard(...)) below @api.post(...)" in str(info.value)


@pytest.mark.parametrize("mode", ["view", "operation"])
def test_a_guard_of_all_operations_is_right_or_refused(
    payer: Client, customer: Customer, settings: Any, mode: str
) -> None:
    other = ninja.NinjaAPI(urls_namespace=f"all-{mode}")
    other.add_decorator(credits_25, mode=mode)
    other.post("/x")(operation(poster))
    if mode == "operation":
        with pytest.raises(TypeError, match="guards nothing on run"):
            _ = other.urls
        return
    urlpatterns = [path("all/", other.urls)]
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urlpatterns})
    assert payer.post("/all/x").status_code == 200
    assert balance(customer) == (75, 0)


def in_settings(settings: Any) -> None:
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django_meterly.middleware.MeterlyMiddleware",
    ]
    settings.METERLY = {
        **settings.METERLY,
        "GUARDED_VIEWS": {"api-1.0.0:plain": {"unit": "image_credits", "amount": 25}},
    }


def test_an_operation_can_be_named_in_the_settings(
    payer: Client, customer: Customer, settings: Any, any_requests: bool
) -> None:
    in_settings(settings)
    assert payer.post("/api/plain").status_code == 200
    assert (ran, states()) == (["plain"], ["committed"])
    assert balance(customer) == (75, 0)


def test_f61_under_atomic_requests_the_message_names_the_remedy(
    payer: Client, customer: Customer, atomic_requests: None
) -> None:
    with pytest.raises(MeterlyUsageError, match="GUARDED_VIEWS"):
        payer.post("/api/post-sync")
    assert ran == states() == []
