"""Work whose amount is 0: a function of the request, or of the job, says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from celery import current_task
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.views import View
from rest_framework.decorators import api_view
from rest_framework.response import Response

from django_meterly import handoffs, meterly_guard
from django_meterly.errors import MeterlyUnavailableError, MeterlyUsageError
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.tasks import meterly_task, release_handed_off
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, movements, states
from tests.jobs import handed_off

if TYPE_CHECKING:
    from django.contrib.auth.models import User
    from django.test import AsyncClient, Client

    from django_meterly.models import Customer

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_free"),
]
ran: list[Any] = []


def price(request: Any, *args: Any, **kwargs: Any) -> int:
    return int(request.GET.get("price", 0))


guarded = meterly_guard("image_credits", amount=price)


def work(request: Any) -> None:
    ran.append(repr(request.meterly))
    if "charge" in request.GET:
        request.meterly.charge(int(request.GET["charge"]))
    if "release" in request.GET:
        request.meterly.release()
    if "hand_off" in request.GET:
        request.meterly.hand_off(job, int(request.GET["hand_off"]))


@guarded
def draw(request: HttpRequest) -> HttpResponse:
    work(request)
    return HttpResponse("drawn")


@guarded
async def adraw(request: HttpRequest) -> HttpResponse:
    work(request)
    return HttpResponse("drawn")


@guarded
def template(request: HttpRequest) -> TemplateResponse:
    work(request)
    return TemplateResponse(request, "tests/good.html")


@guarded
def stream(request: HttpRequest) -> StreamingHttpResponse:
    work(request)
    return StreamingHttpResponse(["dra", "wn"])


@guarded
@api_view(["POST"])
def api(request: Any) -> Response:
    work(request)
    return Response({})


class Draw(MeterlyGuardMixin, View):
    guard_options = {"unit": "image_credits", "amount": price}

    def post(self, request: HttpRequest) -> HttpResponse:
        work(request)
        return HttpResponse("drawn")


@meterly_task("image_credits", name="tests.free.job")
def job(used: int) -> None:
    ran.append("job")
    current_task.meterly.charge(used)


@meterly_task(
    "image_credits", lambda user, amount: amount, customer=lambda user, amount: user
)
def priced(user: str, amount: int) -> None:
    ran.append("priced")


views = {
    "draw": draw,
    "adraw": adraw,
    "template": template,
    "stream": stream,
    "api": api,
    "class": Draw.as_view(),
}
urlpatterns = [path(f"{name}/", view) for name, view in views.items()]


@pytest.fixture(autouse=True)
def nothing_has_run() -> None:
    ran.clear()


@pytest.fixture
def customer(user: User, any_ledger: Any) -> Customer:
    return fund(user)


def nothing_moved(customer: Customer) -> None:
    assert states() == movements() == []
    assert balance(customer) == (100, 0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", views)
@pytest.mark.parametrize("query", ["", "?charge=0", "?release=1"])
def test_work_of_no_credits_runs_and_is_free(
    payer: Client, customer: Customer, name: str, query: str, any_requests: bool
) -> None:
    if name == "adraw" and any_requests:
        return  # Django refuses async views there.
    response = payer.post(f"/{name}/{query}")
    assert response.status_code == 200
    assert b"".join(response) or name == "api"
    assert len(ran) == 1
    assert "0 image_credits" in ran[0]
    nothing_moved(customer)
    # And another price is charged as ever.
    payer.post(f"/{name}/?price=3").close()
    assert balance(customer)[0] == 97


def test_an_async_server_runs_it_alike(
    async_client: AsyncClient, user: User, customer: Customer
) -> None:
    async_client.force_login(user)
    assert async_to_sync(async_client.post)("/adraw/").status_code == 200
    assert len(ran) == 1
    nothing_moved(customer)


@pytest.mark.parametrize("name", views)
def test_work_of_no_credits_cannot_be_charged(
    payer: Client, customer: Customer, name: str
) -> None:
    with pytest.raises(MeterlyUsageError, match=r"charge\(5\) is too much: amount was"):
        payer.post(f"/{name}/?charge=5")
    nothing_moved(customer)


def test_a_cap_is_no_credits_at_most(
    payer: Client,
    customer: Customer,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings.METERLY = {**settings.METERLY, "OVERAGE": "cap"}
    with caplog.at_level(logging.WARNING):
        assert payer.post("/draw/?charge=5").status_code == 200
    assert "used 5 image_credits, but is charged the 0 it reserved" in caplog.text
    nothing_moved(customer)


@pytest.mark.parametrize("enforcement", ["enforce", "shadow", "off"])
def test_every_mode_runs_it(
    payer: Client, customer: Customer, settings: Any, enforcement: str
) -> None:
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": enforcement}
    assert payer.post("/draw/").status_code == 200
    assert len(ran) == 1
    with pytest.raises(MeterlyUsageError, match="is too much"):
        payer.post("/draw/?charge=5")
    nothing_moved(customer)


def test_somebody_has_to_be_known(client: Client, customer: Customer) -> None:
    response = client.post("/draw/", headers={"Accept": "application/json"})
    assert (response.status_code, ran) == (401, [])


def test_who_has_no_credits_or_owes_some_may_do_it(
    payer: Client, customer: Customer
) -> None:
    assert payer.post("/draw/?price=100&charge=150").status_code == 200
    assert states() == ["unbilled"]
    assert payer.post("/draw/?price=1").status_code == 402
    assert payer.post("/draw/").status_code == 200
    assert states() == ["unbilled"]


def test_a_ledger_that_cannot_be_asked_is_not_asked(
    payer: Client, user: User, remote: Any
) -> None:
    fund(user)
    remote.meet("reserve_credits", "unsent")
    assert payer.post("/draw/").status_code == 200
    assert "reserve_credits" not in remote.operations()


# Keys


def test_a_key_is_not_used_up_by_it(payer: Client, customer: Customer) -> None:
    key = {"Idempotency-Key": "k"}
    for _ in range(2):
        assert payer.post("/draw/", headers=key).status_code == 200
    assert len(ran) == 2
    assert payer.post("/draw/?price=25", headers=key).status_code == 200
    assert balance(customer) == (75, 0)


def test_a_key_that_was_used_up_runs_nothing(payer: Client, customer: Customer) -> None:
    key = {"Idempotency-Key": "k"}
    payer.post("/draw/?price=25", headers=key)
    # Once more, when it would be free: the same piece of work.
    response = payer.post("/draw/", headers=key)
    assert (response.status_code, response.json()["state"]) == (409, "committed")
    assert len(ran) == 1
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_a_key_of_work_that_failed_runs_it(payer: Client, customer: Customer) -> None:
    key = {"Idempotency-Key": "k"}
    payer.post("/draw/?price=25&release=1", headers=key)
    assert payer.post("/draw/", headers=key).status_code == 200
    assert len(ran) == 2


def test_what_cannot_be_a_key_is_refused(payer: Client, customer: Customer) -> None:
    assert payer.post("/draw/", headers={"Idempotency-Key": "a b"}).status_code == 400
    assert ran == []


# Tasks


def test_a_task_of_no_credits_runs_and_is_free(user: User, customer: Customer) -> None:
    priced.apply((customer.external_id, 0), throw=True)
    assert ran == ["priced"]
    nothing_moved(customer)
    priced.apply((customer.external_id, 3), throw=True)
    assert balance(customer) == (97, 0)


def test_a_task_that_was_charged_is_not_done_again(
    user: User, customer: Customer
) -> None:
    priced.apply((customer.external_id, 3), task_id="t", throw=True)
    priced.apply((customer.external_id, 0), task_id="t", throw=False)
    assert ran == ["priced"]
    assert balance(customer) == (97, 0)


@pytest.mark.parametrize("amount", [None, True, -1, "3"])
def test_a_task_whose_amount_is_none_does_not_run(
    customer: Customer, amount: Any
) -> None:
    with pytest.raises(ValueError, match=r"amount must be .* has returned it"):
        priced.apply((customer.external_id, amount), throw=True)
    assert ran == states() == []


def test_a_task_may_have_async_options(customer: Customer) -> None:
    async def owner() -> Any:
        return customer

    async def amount() -> int:
        return 7

    @meterly_task("image_credits", amount, customer=owner, name="tests.free.async")
    def task() -> None:
        ran.append("task")

    try:
        task.apply(throw=True)
    finally:
        task.app.tasks.pop("tests.free.async")
    assert ran == ["task"]
    assert balance(customer) == (93, 0)


@pytest.mark.parametrize("name", ["draw", "adraw", "class"])
def test_handed_off_work_of_no_credits_runs_and_is_free(
    payer: Client, customer: Customer, settings: Any, name: str, eager: None
) -> None:
    assert payer.post(f"/{name}/?hand_off=0").status_code == 200
    assert ran[1:] == ["job"]
    nothing_moved(customer)


def test_handed_off_work_of_no_credits_cannot_be_charged(
    payer: Client,
    customer: Customer,
    eager: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    payer.post("/draw/?hand_off=5")
    assert ran[1:] == ["job"]
    assert "charge(5) is too much: amount was 0" in caplog.text
    nothing_moved(customer)


@pytest.fixture
def eager() -> Any:
    """Tasks that run at once, where they are sent from."""
    conf = job.app.conf
    before = conf.task_always_eager
    conf.task_always_eager = True
    yield
    conf.task_always_eager = before


def test_a_revoked_hand_off_of_free_work_has_nothing_to_release(user: User) -> None:
    for word in handoffs.NO_HOLD:
        header = handoffs.sign(word, "jobs.handed_off", "1")
        release_handed_off(header, "jobs.handed_off", "1")
    assert states() == []


@pytest.mark.parametrize("amount", [5, lambda request: 0], ids=["held", "free"])
@pytest.mark.parametrize("enforcement", ["enforce", "shadow"])
def test_a_broker_that_is_down_is_an_outage_whatever_the_work_costs(
    user: User, request_: Any, monkeypatch: Any, amount: Any, enforcement: str
) -> None:
    customer = fund(user)

    def send(*args: Any, **kwargs: Any) -> None:
        raise OSError("The broker is down.")

    monkeypatch.setattr(handed_off, "apply_async", send)

    @meterly_guard("image_credits", amount, enforcement=enforcement)
    def view(request: Any) -> HttpResponse:
        request.meterly.hand_off(handed_off)
        return HttpResponse()

    with pytest.raises(MeterlyUnavailableError, match="The broker is down"):
        view(request_)
    assert "committed" not in states()
    assert balance(customer) == (100, 0)
